"""An interrupted fit goes on: the moments so far in a safetensors file, and what they were summed for."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c2c_kernels.fitting.moments import Moments

_HEADER = "c2c-fit"


class Checkpoint:
    """Keeps moments in a file.

    Args:
        path: of the file.
        made_for: plain JSON values; a checkpoint with others is refused.
        seconds: between two of them.
    """

    def __init__(self, path: Path, made_for: dict[str, Any], seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.made_for = json.loads(json.dumps(made_for))
        self._last = time.perf_counter()

    def restore(self, moments: Moments) -> tuple[int, float]:
        """Fills `moments` from the file, where there is one; (windows done, seconds spent on moments).

        Raises:
            ValueError: for a checkpoint of another fit, or a damaged one.
        """
        from safetensors import safe_open

        if not self.path.exists():
            return 0, 0.0
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            windows, spent = int(header["windows"]), float(header["seconds"])
        except Exception as error:  # SafetensorError is no subclass of anything narrower
            raise ValueError(f"checkpoint {self.path} is damaged ({error}): remove it to start again") from error
        differing = [name for name, value in self.made_for.items() if header.get("made_for", {}).get(name) != value]
        if differing:
            raise ValueError(
                f"checkpoint {self.path} belongs to another fit (other {', '.join(differing)}): remove it, or name "
                "another file"
            )
        moments.load_state(state)
        return windows, spent

    def keep(self, moments: Moments, windows: int, spent: float, *, always: bool = False) -> None:
        """Writes the file where the last one is old enough, or always."""
        if not always and time.perf_counter() - self._last < self.seconds:
            return
        header = {"made_for": self.made_for, "windows": windows, "seconds": spent}
        partial = self.path.with_name(self.path.name + ".partial")
        _write(partial, moments.state(), {_HEADER: json.dumps(header)})
        os.replace(partial, self.path)
        self._last = time.perf_counter()


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written tensor by tensor: the package's own writer copies all of them (1.2 GB) first.

    Layout: 8 bytes length of the header, the header in JSON padded to 8 bytes, the tensors. Source: the format's
    specification at github.com/huggingface/safetensors.
    """
    entries: dict[str, object] = {"__metadata__": metadata}
    at = 0
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, tensor in ordered:
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
