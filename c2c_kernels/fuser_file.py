"""Fusers on the disk: one safetensors file whose header names both models, all shapes and the layer map, as JSON.

Weights keep their dtype. Nothing is unpickled. Needs the package safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import tensor_file
from .fuser_layers import FuserShape, check_temperature
from .layer_maps import check_layers
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

    Raises:
        ValueError: for what `load` would refuse: weights that are infinite or NaN (as `storage`), float64 or of
            several dtypes, a temperature of 0. Nothing is written then.
        FileNotFoundError: where there is no folder for the file.
    """
    if storage is not None and storage not in STORED:
        raise ValueError(f"storage must be one of {', '.join(map(str, STORED))} or None; got {storage!r}")
    tensors = {
        name: tensor.detach().to("cpu", storage or tensor.dtype).contiguous()
        for name, tensor in fuser.state_dict().items()
    }
    stored = "" if storage is None else f" as {storage}"
    wanted = _wanted(fuser.shape, fuser.layer_map)
    check_tensors(f"the fuser cannot be written{stored}", tensors, wanted, ValueError)
    check_temperature("gate_temperature", fuser.gate_temperature)
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
        shape, layer_map = FuserShape(**header["shape"]), dict(header["layer_map"])
        if len(layer_map) != len(header["layer_map"]):
            raise ValueError("layer_map has a receiver layer twice")
        check_layers("layer_map", layer_map, header["receiver_layers"], header["sharer_layers"])
        check_temperature("gate_temperature", header["gate_temperature"])
        # Sizes are compared before anything of such sizes is made.
        check_tensors(str(path), tensors, _wanted(shape, layer_map), FuserFileError)
        with torch.device("meta"):
            fuser = C2CFuser(
                shape,
                layer_map,
                receiver_layers=header["receiver_layers"],
                sharer_layers=header["sharer_layers"],
                dropout=header["dropout"],
                annealing=Annealing(**header["annealing"]),
                sharer=_identity(header["sharer"]),
                receiver=_identity(header["receiver"]),
                facts=header["facts"],
            )
    except FuserFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FuserFileError(f"{path} has a damaged header: {error}") from error
    fuser.gate_temperature = float(header["gate_temperature"])
    fuser.load_state_dict(tensors, assign=True)
    fuser.requires_grad_(True)
    fuser.origin = str(path)
    fuser.warn_if_closed()
    return fuser.eval()


def _identity(entry: Mapping[str, object]) -> Identity:
    found = Identity(**entry)  # type: ignore[arg-type]
    for name, value in asdict(found).items():
        if not isinstance(value, str):
            raise TypeError(f"{name} of a model must be text, got {value!r}")
    return found


def _wanted(shape: FuserShape, layer_map: Iterable[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor."""
    return ((f"layers.{layer}.{name}", size) for layer in layer_map for name, size in shape.tensors())


def check_tensors(
    where: str, tensors: Mapping[str, object], wanted: Iterable[tuple[str, tuple[int, ...]]],
    error_type: type[ValueError],
) -> None:  # fmt: skip
    """Raises unless there are exactly the tensors wanted, plain, of these shapes, finite, of one floating-point dtype.

    Args:
        wanted: name and shape, read up to the first that is missing.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    for name, size in wanted:
        if name not in tensors:
            raise error_type(f"{where} has no tensor {name}: wanted one of shape {size}")
        sizes[name] = size
    dtypes: dict[torch.dtype, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise error_type(f"{where}: {name} is a {type(tensor).__name__}, wanted a tensor")
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            kind = "nested" if tensor.is_nested else f"{tensor.layout} on {tensor.device}"
            raise error_type(f"{where}: {name} is {kind}, wanted plain dense CPU tensors")
        if name not in sizes:
            raise error_type(f"{where} has an extra tensor {name} of shape {tuple(tensor.shape)}")
        if tuple(tensor.shape) != sizes[name]:
            raise error_type(f"{where}: {name} has shape {tuple(tensor.shape)}, wanted {sizes[name]}")
        if tensor.dtype not in STORED:
            raise error_type(f"{where}: {name} is {tensor.dtype}, wanted float32, bfloat16 or float16")
        if not bool(tensor.isfinite().all()):
            raise error_type(f"{where}: {name} has infinite or NaN values")
        dtypes.setdefault(tensor.dtype, name)
    if len(dtypes) > 1:
        raise error_type(f"{where} mixes dtypes: " + ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items()))
