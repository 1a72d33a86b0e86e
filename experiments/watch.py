"""Watch a run from its folder, in a terminal.

python -m experiments.watch [RUN]

The program ``sfl-watch`` of an installed package.
"""

import sys

from sfl.cli import main_watch

if __name__ == "__main__":
    sys.exit(main_watch())
