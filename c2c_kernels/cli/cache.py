"""Files in the cache folder, checked by SHA-256 and put in place at once."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from c2c_kernels.cache_folder import ENVIRONMENT_VARIABLE, cache_dir
from c2c_kernels.cli.errors import CommandError

__all__ = ["ENVIRONMENT_VARIABLE", "cache_dir", "locked", "remove_abandoned", "replace_folder", "sha256", "staging"]


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def staging(name: str) -> Iterator[Path]:
    """The new folder `.name` inside the cache folder, so that a rename out of it is atomic; removed at the end.

    What a killed run left under that name is removed first: call it under a lock that guards the name.
    """
    folder = cache_dir() / f".{name}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the lock `name` of the cache folder: a second process waits and then finds the work done.

    Raises CommandError where the folder cannot be made or the block cannot write there (rights, a full disk).
    """
    from filelock import FileLock

    root = cache_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            yield
    except BrokenPipeError:  # of standard error, not of a file
        raise
    except OSError as error:
        raise CommandError(
            f"the cache folder {root} cannot be used: {error.strerror or error} (${ENVIRONMENT_VARIABLE} names another)"
        ) from error


def remove_abandoned(prefix: str) -> None:
    """Removes staging folders `.{prefix}NAME` of killed runs: those whose lock NAME nobody holds.

    A run that stages under such a name holds that lock from before the folder is made until it is gone.
    """
    from filelock import FileLock, Timeout

    root = cache_dir()
    for folder in root.glob(f".{prefix}*"):
        try:
            with FileLock(root / f".{folder.name.removeprefix(f'.{prefix}')}.lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:
            continue


def replace_folder(new: Path, target: Path) -> None:
    """Puts the folder `new` where `target` is, or was. Call it under the lock that guards `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    os.replace(new, target)
