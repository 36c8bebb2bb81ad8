"""The metadata of a GGUF file, read straight from its header.

The readers of `gguf` and Transformers build numpy views string by string: seconds for a vocabulary of 49,152 tokens,
ten for one of 262,144. This one takes a fraction of a second.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from c2c_kernels.cli.errors import CommandError

_STRING, _ARRAY = 8, 9
# value type -> struct code: u8 i8 u16 i16 u32 i32 f32 bool, then u64 i64 f64
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the file's metadata, arrays as lists. CommandError where `path` is no GGUF file, or damaged."""
    if not path.is_file() or path.stat().st_size < 24:
        raise CommandError(f"{path} is not a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        version, _, count = struct.unpack_from("<IQQ", data, 4)
        if data[:4] != b"GGUF" or version not in (2, 3):
            raise CommandError(f"{path} is not a GGUF file of version 2 or 3")
        metadata, at = {}, 24
        try:
            for _ in range(count):
                key, at = _string(data, at)
                (kind,) = struct.unpack_from("<I", data, at)
                metadata[key], at = _value(data, at + 4, kind)
        except (struct.error, ValueError, KeyError, MemoryError, OverflowError, RecursionError) as error:
            raise CommandError(f"{path} is a damaged GGUF file: its metadata breaks off at byte {at}") from error
    return metadata


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, at)
    if kind == _ARRAY:
        inner, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in _CODES:
            layout = f"<{count}{_CODES[inner]}"
            return list(struct.unpack_from(layout, data, at)), at + struct.calcsize(layout)
        values = []
        for _ in range(count):
            value, at = _value(data, at, inner)
            values.append(value)
        return values, at
    layout = "<" + _CODES[kind]
    return struct.unpack_from(layout, data, at)[0], at + struct.calcsize(layout)


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise struct.error("a string runs past the end of the file")
    return data[at + 8 : end].decode("utf-8"), end
