"""The command `c2c-kernels`."""

from c2c_kernels.cli.main import main

__all__ = ["main"]
