"""Files that the command writes: looked at before anything runs."""

from __future__ import annotations

from pathlib import Path

from c2c_kernels.cli.errors import CommandError


def check(option: str, path: Path, suffix: str = "") -> None:
    """CommandError unless a file can be written at `path`; leaves what is there as it is.

    Args:
        option: as it was given, for the error.
        path: of the file.
        suffix: what its name has to end in.
    """
    if path.is_dir():
        wanted = f"a file name that ends in {suffix}" if suffix else "a file name"
        raise CommandError(f"{option} {path} is a folder: {wanted} is wanted")
    if suffix and path.suffix.lower() != suffix:
        raise CommandError(f"{option} {path}: a file name that ends in {suffix} is wanted")
    if not path.absolute().parent.is_dir():
        raise CommandError(f"{option} {path}: there is no folder {path.parent}")
    was_there = path.exists()
    try:
        path.open("ab").close()
        if not was_there:
            path.unlink()
    except OSError as error:
        raise unwritten(option, path, error) from error


def unwritten(option: str, path: Path, error: OSError) -> CommandError:
    """The error for a file that could not be written."""
    return CommandError(f"{option} {path} cannot be written: {error.strerror or error}")
