"""Interrupted work goes on: tensors in a safetensors file, and in its header what they were made for."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Checkpoint:
    """Keeps the state of a long piece of work in a file.

    Args:
        path: of the file.
        work: what it is, in one word, for the header and for errors: "fit".
        made_for: plain JSON values; a checkpoint with others is refused.
        seconds: between two of them.
    """

    def __init__(self, path: Path, work: str, made_for: dict[str, Any], seconds: float) -> None:
        self.path, self.work, self.seconds = path, work, seconds
        self.made_for = json.loads(json.dumps(made_for))
        self._last = time.perf_counter()

    def restore(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What `keep` was given last: (record, tensors); None where there is no file.

        Raises:
            ValueError: for a checkpoint of other work, or a damaged one.
        """
        from safetensors import safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[f"c2c-{self.work}"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            record, made_for = dict(header["record"]), dict(header["made_for"])
        except Exception as error:  # SafetensorError is no subclass of anything narrower
            raise ValueError(f"checkpoint {self.path} is damaged ({error}): remove it to start again") from error
        differing = [name for name, value in self.made_for.items() if made_for.get(name) != value]
        if differing:
            raise ValueError(
                f"checkpoint {self.path} belongs to another {self.work} (other {', '.join(differing)}): remove it, or "
                "name another file"
            )
        return record, state

    def due(self) -> bool:
        """Whether the last one is old enough."""
        return time.perf_counter() - self._last >= self.seconds

    def keep(self, record: Callable[[], dict[str, Any]], state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Writes the file at once: whoever is interrupted finds the old one or the whole new one."""
        header = {"made_for": self.made_for, "record": record()}
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            _write(partial, state(), {f"c2c-{self.work}": json.dumps(header)})
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        self._last = time.perf_counter()


_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
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
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
