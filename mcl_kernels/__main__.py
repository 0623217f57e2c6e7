"""Runs the command line for `python -m mcl_kernels`."""

import sys

from mcl_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
