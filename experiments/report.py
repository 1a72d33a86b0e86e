"""Show recorded runs side by side on one HTML page, with figures and tables.

python -m experiments.report RUN_DIR [RUN_DIR ...] [--out FILE] [--figures pdf,svg,png] [--tables]

The program ``sfl-report`` of an installed package.
"""

import sys

from sfl.cli import main_report

if __name__ == "__main__":
    sys.exit(main_report())
