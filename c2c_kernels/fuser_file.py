"""Fusers on the disk: one safetensors file whose header names both models, all shapes and the layer map, as JSON.

Weights keep their dtype. Nothing is unpickled. Needs the package safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import tensor_file
from .fuser_layers import FuserShape
from .projectors import Identity

if TYPE_CHECKING:
    from .fusers import C2CFuser

FORMAT = "c2c-kernels fuser"
VERSION = 1
STORED = (torch.float32, torch.bfloat16, torch.float16)


class FuserFileError(ValueError):
    """The file is damaged or is no fuser; the message names it and says what is wrong."""


def save(fuser: C2CFuser, path: str | Path, *, storage: torch.dtype | None = None) -> None:
    """Writes `fuser` to `path`, at once: a reader sees the old file or the whole new one.

    Args:
        fuser: what is written.
        path: of the file.
        storage: torch.float32, bfloat16 or float16; None: as the weights are.
    """
    if storage is not None and storage not in STORED:
        raise ValueError(f"storage must be one of {', '.join(map(str, STORED))} or None; got {storage!r}")
    tensors = {
        name: tensor.detach().to("cpu", storage or tensor.dtype).contiguous()
        for name, tensor in fuser.state_dict().items()
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "shape": asdict(fuser.shape),
        "layer_map": list(fuser.layer_map.items()),
        "receiver_layers": fuser.receiver_layers,
        "sharer_layers": fuser.sharer_layers,
        "dropout": fuser.dropout,
        "annealing": asdict(fuser.annealing),
        "gate_temperature": fuser.gate_temperature,
        "sharer": asdict(fuser.sharer),
        "receiver": asdict(fuser.receiver),
        "facts": fuser.facts,
    }
    tensor_file.write(Path(path), tensors, header)


def load(path: str | Path) -> C2CFuser:
    """The fuser in the file, in evaluation mode, its weights in the dtype that they were stored in.

    Warns where every gate is closed.

    Raises:
        FileNotFoundError: where there is none.
        FuserFileError: for a truncated or damaged file, one of another kind or version, missing, extra or misshapen
            weights, and a map outside of the layers.
    """
    from .fusers import Annealing, C2CFuser

    path = Path(path)
    header, tensors = tensor_file.read(path, "fuser", (FORMAT, VERSION), FuserFileError)
    try:
        fuser = C2CFuser(
            FuserShape(**header["shape"]),
            dict(header["layer_map"]),
            receiver_layers=header["receiver_layers"],
            sharer_layers=header["sharer_layers"],
            dropout=header["dropout"],
            annealing=Annealing(**header["annealing"]),
            sharer=Identity(**header["sharer"]),
            receiver=Identity(**header["receiver"]),
            facts=header["facts"],
        )
        fuser.gate_temperature = float(header["gate_temperature"])
    except (KeyError, TypeError, ValueError) as error:
        raise FuserFileError(f"{path} has a damaged header: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in fuser.state_dict().items()}
    check_tensors(str(path), tensors, wanted, FuserFileError)
    fuser.load_state_dict(tensors, assign=True)
    fuser.requires_grad_(True)
    fuser.origin = str(path)
    fuser.warn_if_closed()
    return fuser.eval()


def check_tensors(
    where: str, tensors: Mapping[str, object], wanted: Mapping[str, tuple[int, ...]], error_type: type[ValueError]
) -> None:
    """Raises unless there are exactly the tensors wanted, of these shapes, finite, of one floating-point dtype."""
    for name in wanted:
        if name not in tensors:
            raise error_type(f"{where} has no tensor {name}: wanted one of shape {wanted[name]}")
    dtypes: dict[torch.dtype, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise error_type(f"{where}: {name} is a {type(tensor).__name__}, wanted a tensor")
        if name not in wanted:
            raise error_type(f"{where} has an extra tensor {name} of shape {tuple(tensor.shape)}")
        if tuple(tensor.shape) != wanted[name]:
            raise error_type(f"{where}: {name} has shape {tuple(tensor.shape)}, wanted {wanted[name]}")
        if tensor.dtype not in STORED:
            raise error_type(f"{where}: {name} is {tensor.dtype}, wanted float32, bfloat16 or float16")
        if not bool(tensor.isfinite().all()):
            raise error_type(f"{where}: {name} has infinite or NaN values")
        dtypes.setdefault(tensor.dtype, name)
    if len(dtypes) > 1:
        raise error_type(f"{where} mixes dtypes: " + ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items()))
