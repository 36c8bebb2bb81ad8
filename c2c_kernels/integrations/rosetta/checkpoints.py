"""Checkpoints of `rosetta` (github thu-nics/C2C): per projector a .json and a .pt, and one map of layers.

    projector_config.json   {receiver: {sharer: {receiver layer: [[sharer layer, projector], ...]}}}
    projector_{i}.json      {"class": "C2CProjector", "init_args": {...}}
    projector_{i}.pt        the state dict: plain tensors, nothing else is unpickled

Of the pairs of a layer the first one counts, as there.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c2c_kernels.fuser_file import check_tensors
from c2c_kernels.fuser_layers import FuserShape, check_dropout, check_temperature
from c2c_kernels.fusers import Annealing, C2CFuser
from c2c_kernels.layer_maps import check_layers

CLASS = "C2CProjector"
CONFIG = "projector_config.json"
_DEFAULTS: dict[str, Any] = {
    "source_num_heads": 1,
    "target_num_heads": 1,
    "intermediate_dim": 1024,
    "hidden_dim": 1024,
    "num_layers": 3,
    "dropout": 0.1,
    "initial_temperature": 1.0,
    "final_temperature": 0.001,
    "anneal_steps": 1929,
}
_NEEDED = ("source_dim", "target_dim")
_IGNORED = ("dtype", "zero_init")  # of the module's making: the tensors have dtypes and values of their own
_TEMPERATURE = "gate_temperature"
# Our name of a part of a half, and theirs.
_PARTS = (
    ("in", "in"), ("embed", "mlp1.blocks.0"), ("project", "proj_mlp2.blocks"), ("out", "proj_out"),
    ("scale", "scalar_mlp2.blocks.0"),
)  # fmt: skip
_LINEAR = ("weight", "bias")


class CheckpointError(ValueError):
    """The folder is no checkpoint that can be read; the message names the file and what is wrong with it."""


def load_checkpoint(folder: str | Path, *, receiver: int = 0) -> dict[int, C2CFuser]:
    """The fusers of a checkpoint by the number of their sharer (1, 2, ...), in evaluation mode.

    Args:
        folder: of the files.
        receiver: number of the model whose cache is fused.

    Returns:
        {sharer: C2CFuser}; bit i of a section's mask is sharer i + 1. Weights keep their dtype. Warns of a fuser
        whose gates are all closed.

    Raises:
        CheckpointError: naming file, tensor and sizes: for projectors of another class, missing, extra or misshapen
            tensors, a pickle that is not plain tensors, truncated files, a map that is none.
    """
    folder = Path(folder)
    maps = _read_map(folder / CONFIG, receiver)
    found = {}
    for sharer, pairs in sorted(maps.items()):
        found[sharer] = _load_fuser(folder, pairs)
    return found


def _load_fuser(folder: Path, pairs: Mapping[int, tuple[int, int]]) -> C2CFuser:
    """The fuser of one sharer from {receiver layer: (sharer layer, projector)}."""
    shape, states, temperature, arguments = None, {}, 1.0, {}
    for layer, (_, number) in pairs.items():
        path = folder / f"projector_{number}.json"
        arguments = _read_arguments(path)
        made = _shape(arguments)
        if shape is not None and made != shape:
            raise CheckpointError(f"{path} has {made}, others {shape}")
        shape = made
        # Sizes are compared before anything of such sizes is made.
        states[layer], temperature = _read_state(folder / f"projector_{number}.pt", shape)
    assert shape is not None  # a map has layers
    with torch.device("meta"):
        fuser = C2CFuser(
            shape, {layer: source for layer, (source, _) in pairs.items()}, dropout=arguments["dropout"],
            annealing=_annealing(arguments),
        )  # fmt: skip
    for layer, state in states.items():
        fuser[layer].load_state_dict(state, assign=True)
    fuser.gate_temperature = temperature
    fuser.requires_grad_(True)
    fuser.origin = str(folder)
    fuser.warn_if_closed()
    return fuser.eval()


def save_checkpoint(fusers: Mapping[int, C2CFuser], folder: str | Path, *, receiver: int = 0) -> None:
    """Writes what `load_checkpoint` and the reference implementation read.

    Args:
        fusers: by the number of their sharer.
        folder: made where it is missing; must hold no checkpoint.
        receiver: number of the model whose cache is fused.

    Raises:
        CheckpointError: before anything is written, where the folder holds a checkpoint or a file of the name of one
            of its files, without fusers, and for what the format has no place for or `load_checkpoint` would refuse:
            values of another head dim than the keys, numbers of sharers below 1, infinite or float64 weights.
    """
    folder = Path(folder)
    files, config = _described(fusers)
    taken = [path for path in (folder / CONFIG, *(folder / name for name in files)) if path.exists()]
    if taken:
        raise CheckpointError(f"{taken[0]} exists: name a folder without a checkpoint")
    if type(receiver) is not int or receiver < 0:
        raise CheckpointError(f"receiver must be an integer of at least 0, got {receiver!r}")
    folder.mkdir(parents=True, exist_ok=True)
    # Last: a folder without it is no checkpoint.
    contents = {**files, CONFIG: {str(receiver): config}}
    try:
        for file, content in contents.items():
            if file.endswith(".pt"):
                # Copies: of a view all that it is a view of would be written.
                torch.save({name: tensor.cpu().clone() for name, tensor in content.items()}, folder / file)
            else:
                (folder / file).write_text(json.dumps(content, indent=None if file == CONFIG else 2))
    except BaseException:
        for file in contents:
            (folder / file).unlink(missing_ok=True)
        raise


def _described(fusers: Mapping[int, C2CFuser]) -> tuple[dict[str, dict], dict[str, dict[str, list[list[int]]]]]:
    """What the projectors' files hold, by name, and {sharer: {receiver layer: [[sharer layer, projector]]}}."""
    if not fusers:
        raise CheckpointError("fusers is empty: a checkpoint has at least one")
    files: dict[str, dict] = {}
    config: dict[str, dict[str, list[list[int]]]] = {}
    number = 0
    for sharer, fuser in fusers.items():
        if type(sharer) is not int or sharer < 1:
            raise CheckpointError(f"fusers has a sharer {sharer!r}, wanted integers of at least 1")
        shape = fuser.shape
        if (shape.sharer_head_dim, shape.head_dim) != (shape.sharer_value_dim, shape.value_dim):
            raise CheckpointError(
                f"a checkpoint has one head dim for keys and values, the fuser of sharer {sharer} two"
            )
    for sharer, fuser in sorted(fusers.items()):
        config[str(sharer)] = {}
        for layer, source in fuser.layer_map.items():
            config[str(sharer)][str(layer)] = [[source, number]]
            weights = fuser[layer].state_dict()
            state = {theirs: weights[ours] for ours, theirs in tensor_names(fuser.shape)}
            state[_TEMPERATURE] = torch.tensor(fuser.gate_temperature, dtype=state["key_gate_logit"].dtype)
            where = f"the fuser of sharer {sharer} cannot be written, layer {layer}"
            on_host = {name: tensor.cpu() for name, tensor in state.items()}
            check_tensors(where, on_host, _wanted(fuser.shape), CheckpointError)
            _checked_temperature(where, state)
            files[f"projector_{number}.pt"] = state
            files[f"projector_{number}.json"] = {"class": CLASS, "init_args": _arguments(fuser)}
            number += 1
    return files, config


def tensor_names(shape: FuserShape) -> list[tuple[str, str]]:
    """(our name, theirs) of every parameter of a layer, in our order."""
    return [(name, _their_name(name)) for name, _ in shape.tensors()]


def _their_name(name: str) -> str:
    half, rest = name.split("_", 1)
    if rest == "gate_logit":
        return name
    if rest in ("scale_weight", "scale_bias"):
        return f"{half}_scalar_head.{rest.removeprefix('scale_')}"
    part, _, last = rest.partition("_")
    place = dict(_PARTS)[part]
    if part == "project":
        number, _, last = last.partition("_")
        place = f"{place}.{number}"
    return f"{half}_{place}.{last if last in _LINEAR else last + '.weight'}"


def _wanted(shape: FuserShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Their name and the shape of every tensor of a projector's file."""
    yield _TEMPERATURE, ()
    for ours, size in shape.tensors():
        yield _their_name(ours), size


def _shape(arguments: Mapping[str, Any]) -> FuserShape:
    source, target = arguments["source_dim"], arguments["target_dim"]
    return FuserShape(
        arguments["source_num_heads"], source, source, arguments["target_num_heads"], target, target,
        arguments["hidden_dim"], arguments["intermediate_dim"], arguments["num_layers"],
    )  # fmt: skip


def _annealing(arguments: Mapping[str, Any]) -> Annealing:
    return Annealing(*(arguments[name] for name in ("initial_temperature", "final_temperature", "anneal_steps")))


def _arguments(fuser: C2CFuser) -> dict[str, Any]:
    shape, annealing = fuser.shape, fuser.annealing
    return {
        "source_dim": shape.sharer_head_dim,
        "target_dim": shape.head_dim,
        "source_num_heads": shape.sharer_heads,
        "target_num_heads": shape.kv_heads,
        "intermediate_dim": shape.inner,
        "hidden_dim": shape.hidden,
        "num_layers": shape.num_layers,
        "dropout": fuser.dropout,
        "initial_temperature": annealing.initial,
        "final_temperature": annealing.final,
        "anneal_steps": annealing.steps,
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated, damaged or no JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs whose names differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _read_map(path: Path, receiver: int) -> dict[int, dict[int, tuple[int, int]]]:
    """{sharer: {receiver layer: (sharer layer, projector)}}."""
    config = _read_json(path)
    try:
        found = _numbered(config)
        if receiver not in found:
            raise CheckpointError(f"{path} has no receiver {receiver}, it has {sorted(found)}")
        maps = {
            sharer: {layer: (pairs[0][0], pairs[0][1]) for layer, pairs in sorted(_numbered(layers).items())}
            for sharer, layers in _numbered(found[receiver]).items()
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not {{receiver: {{sharer: {{layer: [[sharer layer, projector], ...]}}}}}}: {error!r}"
        ) from error
    if not maps or not all(maps.values()):
        raise CheckpointError(f"{path} maps no layers to receiver {receiver}")
    for sharer, pairs in maps.items():
        if sharer < 1:
            raise CheckpointError(f"{path} has a sharer {sharer}, wanted numbers of at least 1")
        for layer, (_, number) in pairs.items():
            if type(number) is not int or number < 0:
                raise CheckpointError(
                    f"{path}, sharer {sharer}, maps layer {layer} to projector {number!r}: wanted an integer of at "
                    "least 0"
                )
        try:
            check_layers(
                f"{path}, sharer {sharer},", {layer: source for layer, (source, _) in pairs.items()}, None, None
            )
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return maps


def _numbered(entries: Mapping[str, Any]) -> dict[int, Any]:
    """By number; "1" and "01" are the same."""
    found = {int(name): entry for name, entry in entries.items()}
    if len(found) != len(entries):
        raise ValueError(f"a number is there twice: {', '.join(entries)}")
    return found


def _read_arguments(path: Path) -> dict[str, Any]:
    described = _read_json(path)
    if not isinstance(described, dict) or not isinstance(described.get("init_args"), dict):
        raise CheckpointError(f'{path} is not {{"class": ..., "init_args": {{...}}}}')
    check_class(described.get("class"), str(path))
    arguments = {name: value for name, value in described["init_args"].items() if name not in _IGNORED}
    for name in _NEEDED:
        if name not in arguments:
            raise CheckpointError(f"{path} has no {name} in init_args")
    unknown = sorted(set(arguments) - set(_DEFAULTS) - set(_NEEDED))
    if unknown:
        raise CheckpointError(f"{path} has init_args that {CLASS} does not have: {', '.join(unknown)}")
    merged = {**_DEFAULTS, **arguments}
    try:
        check_dropout(merged["dropout"])
        _shape(merged), _annealing(merged)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return merged


def check_class(name: object, where: str) -> None:
    """CheckpointError unless it is the class of projectors that there are kernels for."""
    if not isinstance(name, str) or name.lower() != CLASS.lower():  # their registry does not look at case
        raise CheckpointError(f"{where} is a projector of class {name}, supported is {CLASS}")


def _read_state(path: Path, shape: FuserShape) -> tuple[dict[str, Tensor], float]:
    """Weights by our names, and the temperature of the gates."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than plain tensors, or is damaged: {_first_line(error)}") from error
    except Exception as error:  # of a damaged archive: RuntimeError, EOFError, KeyError and others
        raise CheckpointError(f"{path} is truncated, damaged or no state dict: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, wanted a dict of tensors")
    check_tensors(str(path), state, _wanted(shape), CheckpointError)
    temperature = _checked_temperature(str(path), state)
    return {ours: state[theirs] for ours, theirs in tensor_names(shape)}, temperature


def _checked_temperature(where: str, state: Mapping[str, Tensor]) -> float:
    temperature = float(state[_TEMPERATURE])
    try:
        check_temperature(_TEMPERATURE, temperature)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return temperature


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
