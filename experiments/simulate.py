"""Train a configuration in one process, without sockets, and write the same files.

python -m experiments.simulate [run options]

The program ``sfl-simulate`` of an installed package.
"""

import sys

from sfl.cli import main_simulate

if __name__ == "__main__":
    sys.exit(main_simulate())
