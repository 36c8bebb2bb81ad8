"""Tiles that a tuning has found on a device, kept in one JSON file in the cache folder.

The file is read once in a process, when a kernel is first launched on a GPU. What cannot be used in it is ignored with
a warning and is gone after the next tuning. A tile is chosen by the sizes of a row alone, never by the batch or by
lengths, and how decode splits tokens is not tuned: a row gives the same bits in any batch, tuned or not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from ...cache_folder import cache_dir
from .launch import Target
from .tile import Call, Tile, refusal

FILE = "triton-tiles.json"
_FORMAT = 1


class Key(NamedTuple):
    """What a tile is for.

    Attributes:
        kernel: a name that `tunable` was given.
        block_dim: the larger of the head dims, each padded to a power of two.
        dtype: in which products are formed, as torch names it.
        rows: rows that the tile has to have; 0 where they are free.
    """

    kernel: str
    block_dim: int
    dtype: str
    rows: int

    def __str__(self) -> str:
        rows = f" rows {self.rows}" if self.rows else ""
        return f"{self.kernel} dim {self.block_dim} {self.dtype}{rows}"


Tiles = dict[str, dict[str, Tile]]  # by device, then by key
_found: Tiles | None = None
_tried: ContextVar[tuple[Key, Tile] | None] = ContextVar("c2c_triton_tile", default=None)
SHIPPED: dict[str, Callable[..., Tile]] = {}  # by kernel: the table's own choice


def tunable(kernel: str, by_rows: bool = False):
    """Makes a function of `tiles_table` give the tuned tile of `kernel` where there is one, but not for heavy calls.

    by_rows: the tile's rows are given by the call; there is a tile for each number of them.
    """

    def wrap(shipped: Callable[..., Tile]) -> Callable[..., Tile]:
        SHIPPED[kernel] = shipped

        @functools.wraps(shipped)
        def choose(call: Call) -> Tile:
            tile = shipped(call)
            if not call.target.name or call.heavy:
                return tile
            key = key_of(kernel, call.block_dim, call.dtype, tile.rows if by_rows else 0, call.wide)
            trial = _tried.get()
            if trial is not None and trial[0] == key:
                return trial[1]
            return found().get(device_name(call.target), {}).get(str(key), tile)

        return choose

    return wrap


def key_of(kernel: str, block_dim: int, dtype: torch.dtype, rows: int, wide: bool) -> Key:
    """The key of a choice; `rows` as in `Key`."""
    return Key(kernel, block_dim, str(torch.float32 if wide else dtype).removeprefix("torch."), rows)


def device_name(target: Target) -> str:
    """What tiles are kept under: the device, what it compiles for, and by which triton."""
    return f"{target.name}, {target.backend} {target.arch}, triton {triton.__version__}"


@contextlib.contextmanager
def tried(key: Key, tile: Tile) -> Iterator[None]:
    """Lets calls of the block take `tile` where they would choose by `key`."""
    token = _tried.set((key, tile))
    try:
        yield
    finally:
        _tried.reset(token)


def path() -> Path:
    """The file, there or not."""
    return cache_dir() / FILE


def found() -> Tiles:
    """The file's tiles, read at the first call in a process or after `forget`."""
    global _found
    if _found is None:
        _found, problem = read(path())
        if problem:
            warnings.warn(f"{problem}; `c2c-kernels tune` writes it anew", RuntimeWarning, stacklevel=2)
    return _found


def forget() -> None:
    """Lets the next launch read the file again."""
    global _found
    _found = None


def read(file: Path) -> tuple[Tiles, str]:
    """The tiles of a file that can be used, and what is wrong with the rest: "" where nothing is, or no file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{file} is ignored, it cannot be read: {error}"
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not isinstance(content.get("tiles"), dict):
        return {}, f'{file} is ignored: wanted a JSON object with "format": {_FORMAT} and "tiles"'
    tiles: Tiles = {}
    problems: list[str] = []
    for device, entries in content["tiles"].items():
        if not isinstance(entries, dict):
            problems.append(f"tiles of {device!r} must be an object, got {type(entries).__name__}")
            continue
        for name, fields in entries.items():
            try:
                tiles.setdefault(device, {})[name] = _tile(name, fields)
            except ValueError as error:
                problems.append(f"{name!r}: {error}")
    if problems:
        return tiles, f"{file}: {len(problems)} of its tiles are ignored, the first: {problems[0]}"
    return tiles, ""


def _tile(name: str, fields: Any) -> Tile:
    """ValueError where the key is unknown or the tile none that a tuning tries."""
    kernel, *rest = name.split(" ")
    known = kernel in SHIPPED and len(rest) in (3, 5) and rest[0] == "dim" and rest[1].isdecimal()
    known = known and rest[2] in _SIZES and (len(rest) == 3 or (rest[3] == "rows" and rest[4].isdecimal()))
    if not known:
        raise ValueError("no kernel is tuned under this name")
    if not isinstance(fields, dict) or set(fields) != set(Tile._fields):
        raise ValueError(f"wanted {', '.join(Tile._fields)}; got {fields!r}")
    tile = Tile(**fields)
    why = refusal(tile, int(rest[1]), _SIZES[rest[2]], int(rest[4]) if len(rest) == 5 else None)
    if why:
        raise ValueError(why)
    return tile


_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


def store(target: Target, tiles: dict[Key, Tile]) -> Path:
    """Adds tiles of a device to the file, whose other tiles stay, and puts it in place at once; returns its path.

    Raises OSError where the folder cannot be written.
    """
    from filelock import FileLock  # torch needs it

    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.parent / f".{FILE}.lock"):
        everything, _ = read(file)
        everything.setdefault(device_name(target), {}).update({str(key): tile for key, tile in tiles.items()})
        content = {
            "format": _FORMAT,
            "tiles": {
                device: {name: tile._asdict() for name, tile in sorted(entries.items())}
                for device, entries in sorted(everything.items())
            },
        }
        handle, new = tempfile.mkstemp(prefix=f".{FILE}.", dir=file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=2)
                stream.write("\n")
            os.replace(new, file)
        except BaseException:
            Path(new).unlink(missing_ok=True)
            raise
    forget()
    return file
