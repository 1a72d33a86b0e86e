"""Predict images with the trained model of a run, here or with its back on a server.

python -m experiments.predict RUN_DIR IMAGES ...

The program ``sfl-predict`` of an installed package.
"""

import sys

from sfl.cli import main_predict

if __name__ == "__main__":
    sys.exit(main_predict())
