"""Projectors on the disk: one safetensors file whose header holds everything but the weights, as JSON.

Weights are float32, bfloat16, or int8 with float32 scales per column and per row: the error of a weight is at most
1/254 of the largest weight of its column, whose features may be much smaller or larger than others.
Nothing is unpickled. Needs the package safetensors.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import tensor_file

if TYPE_CHECKING:
    from .projectors import CacheProjector

FORMAT = "c2c-kernels cache projector"
VERSION = 1
STORAGES = ("float32", "bfloat16", "int8")
_ROWS, _COLUMNS = ".rows", ".columns"


class ProjectorFileError(ValueError):
    """The file is damaged or is no projector; the message names it and says what is wrong."""


def save(projector: CacheProjector, path: str | Path, *, storage: str = "float32") -> None:
    """Writes `projector` to `path`, at once: a reader sees the old file or the whole new one.

    Args:
        projector: what is written.
        path: of the file.
        storage: "float32", "bfloat16", or "int8" for matrices (biases and gates stay float32).
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}; got {storage!r}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in projector.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if storage == "float32" or "proj" not in name:
            tensors[name] = tensor.float()
        elif storage == "bfloat16":
            tensors[name] = tensor.bfloat16()
        else:
            tensors[name], tensors[name + _ROWS], tensors[name + _COLUMNS] = _to_int8(tensor.float())
    tensor_file.write(Path(path), tensors, _header(projector))


def load(path: str | Path) -> CacheProjector:
    """The projector in the file, in float32.

    Raises:
        FileNotFoundError: where there is none.
        ProjectorFileError: for a truncated or damaged file, one of another kind or version, and missing or
            misshapen weights.
    """
    from .projectors import CacheProjector, CacheShape, Identity, Source

    path = Path(path)
    header, tensors = tensor_file.read(path, "projector", (FORMAT, VERSION), ProjectorFileError)
    try:
        projector = CacheProjector(
            CacheShape(**_tuples(header["sharer"])),
            CacheShape(**_tuples(header["receiver"])),
            [([Source(*s) for s in keys], [Source(*s) for s in values]) for keys, values in header["sources"]],
            rank=header["rank"],
            tokens=header["tokens"],
            strategy=header["strategy"],
            prefix=header["prefix"],
            sharer_identity=Identity(**header["sharer_identity"]),
            receiver_identity=Identity(**header["receiver_identity"]),
            facts=header["facts"],
        )
        if header["gates"] is not None:
            projector.add_gates(header["gates"])
            projector.gate_temperature = float(header["gate_temperature"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProjectorFileError(f"{path} has a damaged header: {error!r}") from error
    state = {}
    for name, wanted in projector.state_dict().items():
        if name not in tensors:
            raise ProjectorFileError(f"{path} has no weights {name}")
        tensor = tensors[name]
        if tensor.dtype == torch.int8:
            if name + _ROWS not in tensors or name + _COLUMNS not in tensors:
                raise ProjectorFileError(f"{path} has no scales for {name}")
            tensor = tensor.float() * tensors[name + _ROWS] * tensors[name + _COLUMNS]
        if tensor.shape != wanted.shape:
            raise ProjectorFileError(f"{path}: {name} has shape {tuple(tensor.shape)}, wanted {tuple(wanted.shape)}")
        if not bool(tensor.isfinite().all()):
            raise ProjectorFileError(f"{path}: {name} has infinite or NaN values")
        state[name] = tensor.float()
    projector.load_state_dict(state)
    return projector


def _header(projector: CacheProjector) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "sharer": asdict(projector.sharer),
        "receiver": asdict(projector.receiver),
        "sources": [[list(layer.key_sources), list(layer.value_sources)] for layer in projector.maps],
        "rank": projector.rank,
        "tokens": projector.tokens,
        "strategy": projector.strategy,
        "prefix": projector.prefix,
        "gates": None if projector.gate_logits is None else projector.gate_logits.shape[1],
        "gate_temperature": projector.gate_temperature,
        "sharer_identity": asdict(projector.sharer_identity),
        "receiver_identity": asdict(projector.receiver_identity),
        "facts": projector.facts,
    }


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers -127 .. 127, the scale of each row (..., 1) and of each column (columns,)."""
    columns = _nonzero(tensor.abs().flatten(0, -2).amax(dim=0))
    tensor = tensor / columns
    rows = _nonzero(tensor.abs().amax(dim=-1, keepdim=True)) / 127
    return (tensor / rows).round().to(torch.int8), rows, columns


def _nonzero(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 where there is nothing to scale."""
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Lists of JSON as the tuples that a CacheShape has."""

    def convert(value: Any) -> Any:
        return tuple(convert(item) for item in value) if isinstance(value, list) else value

    return {name: convert(value) for name, value in fields.items()}
