"""Where the command `c2c-kernels` starts: outside the package, whose import takes seconds and can be interrupted."""

import sys


def main() -> int:
    """Imports and runs the command; returns its exit status, 130 where it is interrupted while importing."""
    try:
        from c2c_kernels.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("c2c-kernels: interrupted\n")
        return 130
    return run()
