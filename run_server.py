#!/usr/bin/env python3
"""Start the server of a run; ``--help`` lists the options."""

import sys

from sfl.cli import main_server

if __name__ == "__main__":
    sys.exit(main_server())
