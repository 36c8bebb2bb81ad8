"""`python -m c2c_kernels.cli`."""

import sys

from c2c_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
