"""Write a part of a run's trained model as one file, for use without SFL.

python -m experiments.export RUN_DIR --to torch|onnx|exported [--part PART] [--out FILE]

The program ``sfl-export`` of an installed package; docs/trained-models.md shows how to use its
files.
"""

import sys

from sfl.cli import main_export

if __name__ == "__main__":
    sys.exit(main_export())
