#!/usr/bin/env python3
"""Take part in a run as a client; ``--help`` lists the options."""

import sys

from sfl.cli import main_client

if __name__ == "__main__":
    sys.exit(main_client())
