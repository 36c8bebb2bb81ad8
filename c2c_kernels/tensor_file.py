"""Safetensors files whose header holds everything but the tensors, as JSON. Nothing is unpickled.

Needs the package safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_HEADER = "c2c"


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes the file at once: a reader sees the old one or the whole new one."""
    _, save_file = _safetensors()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        usual = partial.stat().st_mode
        save_file(dict(tensors), partial, metadata={_HEADER: json.dumps(header, ensure_ascii=False)})
        partial.chmod(usual)  # safetensors 0.8 lets the owner alone read it
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(
    path: Path, what: str, wanted: tuple[str, int], error_type: type[ValueError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of a file whose header has the "format" and "version" wanted.

    Args:
        path: of the file.
        what: it is, for errors: "projector".
        wanted: format and version.
        error_type: of what is raised for a truncated or damaged file, or one of another kind.

    Raises:
        FileNotFoundError: where there is none.
    """
    safe_open, _ = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a {what} file is wanted")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except OSError as error:
        raise error_type(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # SafetensorError is no subclass of anything narrower
        raise error_type(f"{path} is truncated, damaged or no safetensors file: {error}") from error
    try:
        header = json.loads(metadata[_HEADER])
        found = (header["format"], header["version"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise error_type(f"{path} is a safetensors file without the header of a {what}") from error
    if found != wanted or type(found[1]) is not int:
        raise error_type(f"{path} is {found[0]!r} version {found[1]!r}, wanted {wanted[0]!r} version {wanted[1]}")
    return header, tensors


def _safetensors() -> tuple[Any, Any]:
    """(safe_open, save_file); ImportError that says what to install."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("such files need the package safetensors: pip install 'c2c-kernels[hf]'") from error
    return safe_open, save_file
