"""`python -m mcl_kernels` is `mcl-kernels`."""

import sys

from mcl_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
