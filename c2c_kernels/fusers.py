"""The paper's fuser for all layers of a receiver-sharer pair: it rewrites the receiver's cache in place.

    fuser = c2c.C2CFuser.load("qwen2.5-qwen3.safetensors")
    fuser.fuse_cache(receiver_cache, sharer_cache, 0, 512)     # both models have read the same 512 tokens

For every mapped receiver layer, with keys and values each of their own weights (`fuser_weights`):

    key' = key + [gate_logit > 0] w P,   w and P of the receiver's and the sharer's token

Source: arXiv 2510.03215; DESIGN.md 2.3.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .fuser_layers import FuserLayer, FuserShape, check_dropout, check_temperature
from .fuser_weights import Pair
from .layer_maps import LayerMap, check_layers, resolve
from .ops._checks import check_index, expect, expect_integers
from .ops._fuse_checks import check_apart
from .ops.fuse_kv import FuseCall, check_calls, fuse_apart, touched
from .projectors import Identity

Mode = Literal["parallel", "sequential"]
MODES = ("parallel", "sequential")
# Of several sharers that read the clean cache, the sums of as many layers are kept in float32 at a time.
_SUM_BYTES = 48 << 20
_UNKNOWN = Identity()


class LayerGates(NamedTuple):
    """Which halves of a receiver layer are fused with which sharer layer."""

    layer: int
    source: int
    key: bool
    value: bool


@dataclass(frozen=True)
class Annealing:
    """Temperature of the soft gates: from `initial` to `final` in `steps`, by equal ratios."""

    initial: float = 1.0
    final: float = 0.001
    steps: int = 1929

    def __post_init__(self) -> None:
        check_temperature("initial temperature", self.initial)
        check_temperature("final temperature", self.final)
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps of annealing must be an integer of at least 1, got {self.steps!r}")

    def at(self, step: int) -> float:
        return self.initial * (self.final / self.initial) ** min(step / self.steps, 1.0)


class C2CFuser(nn.Module):
    """Fusers of a pair of models, one `FuserLayer` per mapped receiver layer.

    Args:
        shape: of every layer.
        layer_map: {receiver layer: sharer layer}.
        receiver_layers, sharer_layers: how many the models have, None where that is not known.
        dropout: in training.
        annealing: of the gates' temperature in training.
        sharer, receiver: the models it is made for.
        facts: what it was trained on and how; plain JSON values.

    Attributes:
        layer_map: as given, in the order of layers.
        gate_temperature: of the soft gates; `update_temperature` lowers it.
        origin: the file or folder that it was read from, "".
    """

    def __init__(
        self,
        shape: FuserShape,
        layer_map: Mapping[int, int],
        *,
        receiver_layers: int | None = None,
        sharer_layers: int | None = None,
        dropout: float = 0.1,
        annealing: Annealing = Annealing(),
        sharer: Identity = _UNKNOWN,
        receiver: Identity = _UNKNOWN,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_layers("layer_map", layer_map, receiver_layers, sharer_layers)
        if not layer_map:
            raise ValueError("layer_map is empty: wanted at least one receiver layer")
        check_dropout(dropout)
        self.shape, self.layer_map = shape, dict(sorted(layer_map.items()))
        self.receiver_layers, self.sharer_layers = receiver_layers, sharer_layers
        self.dropout, self.annealing = dropout, annealing
        self.sharer, self.receiver = sharer, receiver
        self.facts: dict[str, Any] = dict(facts or {})
        self.gate_temperature = annealing.initial
        self.origin = ""
        self._warned = False
        self.layers = nn.ModuleDict({str(layer): FuserLayer(shape, dropout) for layer in self.layer_map})

    @classmethod
    def for_models(
        cls,
        receiver: Any,
        sharer: Any,
        layer_map: LayerMap = "last_aligned",
        *,
        hidden: int = 1024,
        inner: int = 1024,
        num_layers: int = 3,
        **options: Any,
    ) -> C2CFuser:
        """An untrained fuser, its gates closed, for two Transformers models (or their configurations).

        Args:
            layer_map: "last_aligned", "k_nearest", {receiver layer: sharer layer}, or a list over receiver layers.
            hidden, inner, num_layers: see `FuserShape`.
            options: of `C2CFuser`.
        """
        own, raw = cache_sizes(receiver), cache_sizes(sharer)
        shape = FuserShape(raw[1], raw[2], raw[2], own[1], own[2], own[2], hidden, inner, num_layers)
        return cls(shape, resolve(layer_map, own[0], raw[0]), receiver_layers=own[0], sharer_layers=raw[0], **options)

    def __getitem__(self, layer: int) -> FuserLayer:
        """The fuser of receiver layer `layer`."""
        return cast("FuserLayer", self.layers[str(layer)])

    def update_temperature(self, step: int) -> float:
        """Sets and returns the temperature of the soft gates at a step of training."""
        self.gate_temperature = self.annealing.at(step)
        return self.gate_temperature

    def gate_report(self) -> list[LayerGates]:
        """Which gates are open, by receiver layer. Reads the weights: on a GPU this waits for it."""
        return [
            LayerGates(layer, source, *(bool(logit > 0) for logit in self[layer].gate_logits))
            for layer, source in self.layer_map.items()
        ]

    def warn_if_closed(self) -> None:
        """Warns where every gate is closed: such a fuser changes nothing."""
        if not any(gates.key or gates.value for gates in self.gate_report()):
            where = f"of {self.origin} " if self.origin else ""
            warnings.warn(
                f"every gate of the fuser {where}is closed ({2 * len(self.layer_map)} of {2 * len(self.layer_map)}): "
                "it changes nothing; see gate_report()",
                stacklevel=3,
            )

    def _warn_once(self) -> None:
        """`warn_if_closed`, the first time, where looking costs nothing."""
        if torch.compiler.is_compiling():
            return
        if not self._warned and next(self.parameters()).device.type == "cpu":
            self._warned = True
            self.warn_if_closed()

    def forward(
        self,
        receiver: Sequence[Pair],
        sharer: Sequence[Pair],
        *,
        index: Tensor | None = None,
        backend: str | None = None,
    ) -> list[Pair]:
        """New (key, value) per receiver layer, differentiable; in training with soft gates and dropout.

        Args:
            receiver: per layer (key, value), each (batch, kv_heads, len, head_dim).
            sharer: per layer (key, value), each (batch, sharer_heads, sharer_len, sharer_head_dim).
            index: (batch, len), the sharer token of every receiver token; None: one to one.
            backend: of `fuse_kv`.
        """
        self._check_layers(receiver, sharer)
        return [
            self[layer](
                pair, sharer[self.layer_map[layer]], index=index, temperature=self.gate_temperature, backend=backend
            )
            if layer in self.layer_map
            else pair
            for layer, pair in enumerate(receiver)
        ]

    def fuse_cache(
        self,
        receiver_cache: Any,
        sharer_cache: Any,
        start: int = 0,
        stop: int | None = None,
        *,
        index: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """Rewrites tokens start..stop of the receiver's cache in place, with the hard gates and without autograd.

        Args:
            receiver_cache: a Transformers DynamicCache or StaticCache, or per layer (key, value). Untouched where
                anything is refused.
            sharer_cache: likewise.
            start, stop: tokens of the receiver's cache; None: to its end.
            index: (batch, stop - start), for each of them the token of the sharer's cache that it reads; None: the
                sharer's token of the same number.
            backend: of `fuse_kv`.

        Raises:
            ValueError, TypeError: for quantised, offloaded or truncated caches, other shapes than the fuser's, caches
                of different batch or length without an index, tokens that are not there, layers that share memory
                with others or with the sharer's.
        """
        fuse_caches(receiver_cache, [(self, sharer_cache)], start, stop, indices=[index], backend=backend)

    def check_models(self, receiver: Any, sharer: Any) -> None:
        """ValueError unless the caches of two Transformers models (or configurations) have the fuser's shapes."""
        shape, of = self.shape, f" of {self.origin}" if self.origin else ""
        for role, model, wanted, layers in (
            ("receiver", receiver, (shape.kv_heads, shape.head_dim), self.receiver_layers),
            ("sharer", sharer, (shape.sharer_heads, shape.sharer_head_dim), self.sharer_layers),
        ):
            found = cache_sizes(model)
            if found[1:] != wanted:
                raise ValueError(
                    f"the {role} has {found[1]} KV heads x {found[2]}, the fuser{of} is made for "
                    f"{wanted[0]} x {wanted[1]}"
                )
            if layers is not None and found[0] != layers:
                raise ValueError(f"the {role} has {found[0]} layers, the fuser{of} is made for {layers}")
        check_layers(f"the fuser{of}", self.layer_map, cache_sizes(receiver)[0], cache_sizes(sharer)[0])

    def _check_layers(self, receiver: Sequence[Pair], sharer: Sequence[Pair], name: str = "sharer") -> None:
        """Layers and widths of two caches against the fuser's."""
        shape, of = self.shape, f" of {self.origin}" if self.origin else ""
        check_layers(f"the fuser{of}", self.layer_map, len(receiver), len(sharer))
        for role, found, layers in (
            ("receiver", len(receiver), self.receiver_layers),
            (name, len(sharer), self.sharer_layers),
        ):
            if layers is not None and found != layers:
                raise ValueError(f"{role} has {found} layers, the fuser{of} is made for {layers}")
        for layer, source in self.layer_map.items():
            for role, number, pair, wanted in (
                ("receiver", layer, receiver[layer], (shape.kv_heads, shape.head_dim, shape.value_dim)),
                (name, source, sharer[source], (shape.sharer_heads, shape.sharer_head_dim, shape.sharer_value_dim)),
            ):
                key, value = pair
                if (key.shape[1], key.shape[3], value.shape[3]) != wanted:
                    raise ValueError(
                        f"{role} layer {number} has key {tuple(key.shape)} and value {tuple(value.shape)}, the "
                        f"fuser{of} is made for (batch, {wanted[0]}, len, {wanted[1]}) and (..., {wanted[2]})"
                    )

    def save(self, path: str | Path, *, storage: torch.dtype | None = None) -> None:
        """Writes a safetensors file; see `c2c_kernels.fuser_file.save`."""
        from .fuser_file import save

        save(self, path, storage=storage)

    @classmethod
    def load(cls, path: str | Path) -> C2CFuser:
        """Reads what `save` wrote; see `c2c_kernels.fuser_file.load`."""
        from .fuser_file import load

        return load(path)


@torch.no_grad()
def fuse_caches(
    receiver_cache: Any,
    fused: Sequence[tuple[C2CFuser, Any]],
    start: int = 0,
    stop: int | None = None,
    *,
    mode: Mode = "parallel",
    indices: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> None:
    """Several sharers into one receiver's cache, in place.

    Args:
        fused: (fuser, sharer cache) of every sharer.
        mode: "parallel": all read the clean cache, and what they add is summed (in float32, rounded once).
            "sequential": each reads what the one before it has written.
        indices: per sharer an `index`, see `C2CFuser.fuse_cache`.
        receiver_cache, start, stop, backend: see there.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    indices = [None] * len(fused) if indices is None else list(indices)
    if len(indices) != len(fused):
        raise ValueError(f"indices has {len(indices)} entries, wanted one per sharer ({len(fused)})")
    own = _layers(receiver_cache, "receiver_cache")
    start, stop = _token_range(own, start, stop)
    chains: dict[int, list[FuseCall]] = {}
    for number, ((fuser, sharer_cache), index) in enumerate(zip(fused, indices, strict=True)):
        name = "sharer_cache" if len(fused) == 1 else f"sharer_cache {number}"
        raw = _layers(sharer_cache, name)
        fuser._check_layers(own, raw, name)
        _check_tokens(own, raw, start, stop, index, name)
        if index is not None:
            tokens = (own[0][0].shape[0], stop - start, raw[0][0].shape[2])
            _check_index("index" if len(fused) == 1 else f"indices[{number}]", index, *tokens)
        fuser._warn_once()
        for layer, source in fuser.layer_map.items():
            receiver = _tokens(own[layer], start, stop)
            sharer = raw[source] if index is not None else _tokens(raw[source], start, stop)
            call = FuseCall(*receiver, *sharer, fuser[layer].weights(), index, out=receiver)
            chains.setdefault(layer, []).append(call)
    # A layer that is not fused is read: it is to stay as it is.
    check_apart(
        {
            f"receiver_cache layer {layer}": touched(chains[layer]) if layer in chains else (pair, ())
            for layer, pair in enumerate(own)
        }
    )
    if len(fused) > 1:  # everything is checked before anything is written
        check_calls([call for chain in chains.values() for call in chain], backend)
    if mode == "sequential":
        for number in range(len(fused)):
            fuse_apart([chain[number] for chain in chains.values() if number < len(chain)], backend)
        return
    alone = [chain[0] for chain in chains.values() if len(chain) == 1]
    several = [chain for chain in chains.values() if len(chain) > 1]
    if alone:
        fuse_apart(alone, backend)
    for group in _groups(several):
        _fuse_sums(group, backend)


def _fuse_sums(chains: list[list[FuseCall]], backend: str | None) -> None:
    """Several sharers per layer: all but the last add to sums in float32, the last one rounds into the cache."""
    sums = [
        (
            torch.empty_like(chain[0].receiver_key, dtype=torch.float32),
            torch.empty_like(chain[0].receiver_value, dtype=torch.float32),
        )
        for chain in chains
    ]
    for number in range(max(map(len, chains))):
        step = []
        for chain, total in zip(chains, sums, strict=True):
            if number < len(chain):
                last = number == len(chain) - 1
                step.append(
                    replace(
                        chain[number],
                        residual=None if number == 0 else total,
                        out=chain[number].out if last else total,
                    )
                )
        fuse_apart(step, backend)


def _groups(chains: list[list[FuseCall]]) -> list[list[list[FuseCall]]]:
    """Layers whose sums fit into `_SUM_BYTES` together, at least one."""
    groups: list[list[list[FuseCall]]] = []
    room = 0
    for chain in chains:
        size = 4 * (chain[0].receiver_key.numel() + chain[0].receiver_value.numel())
        if not groups or size > room:
            groups.append([])
            room = _SUM_BYTES
        groups[-1].append(chain)
        room -= size
    return groups


def cache_sizes(model: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head dim) of a Transformers model's cache, or of a configuration's."""
    config = getattr(model, "config", model)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim


def _layers(cache: Any, name: str) -> list[Pair]:
    """Per layer (key, value): views of what the cache holds."""
    # Imports go down; this is the one step up, taken where there is a cache of Transformers.
    from .integrations.transformers.caches import read_cache

    return read_cache(cache, name)


def _tokens(pair: Pair, start: int, stop: int) -> Pair:
    return pair[0][:, :, start:stop], pair[1][:, :, start:stop]


def _token_range(own: list[Pair], start: int, stop: int | None) -> tuple[int, int]:
    length = own[0][0].shape[2]
    stop = length if stop is None else stop
    for name, token in (("start", start), ("stop", stop)):
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name} must be an integer, got {token!r}")
    if not 0 <= start <= stop <= length:
        raise ValueError(f"tokens {start}..{stop} are not in receiver_cache, which holds {length}")
    return start, stop


def _check_index(name: str, index: Tensor, batch: int, count: int, raw_count: int) -> None:
    """An index of `count` tokens into a cache of `raw_count`; values where they are on the host."""
    expect_integers(name, index)
    expect(name, index, (batch, count), "(batch, stop - start)")
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        check_index(name, index, raw_count)


def _check_tokens(own: list[Pair], raw: list[Pair], start: int, stop: int, index: Tensor | None, name: str) -> None:
    batch, length = raw[0][0].shape[0], raw[0][0].shape[2]
    if batch != own[0][0].shape[0]:
        raise ValueError(f"{name} has batch {batch}, receiver_cache has {own[0][0].shape[0]}")
    if index is None and length < stop:
        raise ValueError(f"{name} holds {length} tokens: without an index it must hold the {stop} of receiver_cache")
