"""Turning merged attention on in a model, and giving its forward passes a context."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

import c2c_kernels as c2c
from c2c_kernels.integrations.transformers.attention import LEVELS, NAME, PATCH, Call, MassRecord
from c2c_kernels.integrations.transformers.context import CARRIED, SharedContext

Model = TypeVar("Model", bound=PreTrainedModel)

_UNSET: Any = object()
_LAYER_TYPES = ("full_attention", "sliding_attention")


class _Session:
    """One open session; compared by identity, as the same context may be open twice."""

    def __init__(self, context: SharedContext | None) -> None:
        self.context = context


class _Sessions(threading.local):
    """The sessions that the current thread has opened, innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Session] = []


class Patch:
    """What `enable` knows about a model; its `before_forward` and `after_forward` are the model's forward hooks.

    Copies and pickles of an enabled model have neither its sessions nor its record.
    """

    def __init__(self, model: PreTrainedModel, backend: str | None, attention: list[nn.Module], previous: str) -> None:
        self.backend = backend
        self.previous = previous
        self.attention = attention
        self.windows = _windows(model)
        self.arguments = [name for name in inspect.signature(model.forward).parameters if name != "self"]
        self.checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.sessions = _Sessions()
        self.opened: list[_Session] = []  # of all threads
        self.record: MassRecord | None = None
        self.hooks = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("sessions", "opened", "record")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, sessions=_Sessions(), opened=[], record=None)

    def before_forward(
        self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hands the forward pass's context to the layers as `c2c`, and moves its position ids to follow it."""
        if len(args) > 1:
            args, kwargs = (), {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        context = kwargs.pop("c2c", _UNSET)
        if type(context) is Call:
            # An outer model, enabled too, has been here already.
            return args, {**kwargs, "c2c": context}
        if context is _UNSET:
            context = getattr(kwargs.get("past_key_values"), CARRIED, None)
            stack = self.sessions.stack
            if context is None and stack:
                context = stack[-1].context
        if getattr(model, "_is_replica", False) and (context is not None or self.opened):
            raise RuntimeError("nn.DataParallel splits the batch but not the context: use DistributedDataParallel")
        if model.config._attn_implementation != NAME:
            if context is not None:
                raise RuntimeError(
                    f"the model's attention implementation is {model.config._attn_implementation!r} now, not "
                    f"{NAME!r}: something set it after enable(), and the context would not be read"
                )
            return args, kwargs
        if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
            raise ValueError("packed sequences (cu_seq_lens_q, cu_seq_lens_k) are not supported: pad the batch instead")
        weights = kwargs.get("output_attentions")
        if weights is None:
            weights = getattr(model.config, "output_attentions", False)
        call = Call(self.backend, self.record, bool(weights))
        if context is not None:
            self._share(call, _checked_context(context, "c2c"), model, args, kwargs)
        if (context is not None or self.record is not None) and not torch.compiler.is_compiling():
            call.seen = []
        call.owner = self
        kwargs["c2c"] = call
        return args, kwargs

    def after_forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """RuntimeError unless every layer has read the forward pass's context, or was recorded, exactly once."""
        call = kwargs.get("c2c")
        if type(call) is not Call or call.owner is not self or call.seen is None:
            return
        # Checkpointed layers run again in the backward pass, after this.
        seen, call.seen = call.seen, None
        count = model.config.num_hidden_layers  # `generate` lowers it for an assistant that exits early
        dropping = model.training and getattr(model.config, "layerdrop", 0)
        missing = [] if dropping else sorted(set(range(count)) - set(seen))
        repeated = sorted({layer for layer in seen if seen.count(layer) > 1})
        if missing:
            raise RuntimeError(
                f"c2c: the call did not reach the attention of layers {missing}: {type(model).__name__} does not hand "
                "**kwargs on to it, or does not go through the AttentionInterface there, and cannot be served"
            )
        if repeated:
            raise RuntimeError(
                f"c2c: the attention of layers {repeated} ran more than once: {type(model).__name__} computes a layer "
                "from several attentions, each of which would read the context, and cannot be served"
            )

    def _share(
        self,
        call: Call,
        context: SharedContext,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            raise ValueError("c2c: the forward pass has neither input_ids nor inputs_embeds")
        batch, q_len = inputs.shape[:2]
        if len(context.layers) != len(self.attention):
            raise ValueError(
                f"c2c: the context is made for {len(context.layers)} layers, the model has {len(self.attention)}"
            )
        if batch % context.batch:
            raise ValueError(f"c2c: a batch of {batch} rows does not divide by the context's {context.batch} rows")
        if torch.is_grad_enabled() and model.training and self._reentrant() and context.trainable:
            context = context.with_leaves()
        call.layers = context.rows(batch)
        call.spaces = context.spaces
        call.windows = self.windows
        offset = context.offset_rows(batch)
        if offset is None and not context.positioned:
            return
        positions = _own_positions(kwargs, batch, q_len, inputs.device)
        if offset is not None:
            positions = positions + offset.to(inputs.device)
        kwargs["position_ids"] = positions
        call.positions = positions.expand(batch, q_len)

    def _reentrant(self) -> bool:
        """Whether some layer is checkpointed in the re-entrant way."""
        for module in self.checkpointed:
            if module.gradient_checkpointing:
                options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
                if options.get("use_reentrant") is not False:
                    return True
        return False


def enable(model: Model, backend: str | None = None) -> Model:
    """Makes every attention layer of `model` run merged attention; returns the model.

    Without a context the model computes what it did. Calling it again changes the backend, and takes the model over
    again where something has set another attention implementation meanwhile.

    Some models cannot be told from their looks: a forward pass with a context, or under `record_mass`, raises
    RuntimeError where a layer did not see the context exactly once (not inside a torch.compile of the whole model).

    Args:
        model: a decoder-only language model whose layers go through Transformers' AttentionInterface.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the fastest that can run each call.

    Raises:
        TypeError: for what is no PreTrainedModel (wrappers, compiled models).
        ValueError: for models that cannot be served, saying why, and unknown or missing backends.
    """
    if not isinstance(model, PreTrainedModel):
        hint = "enable the model inside it" if isinstance(model, nn.Module) else "load it first"
        if isinstance(model, nn.DataParallel):
            hint = "DataParallel splits the batch but not the context; use DistributedDataParallel"
        raise TypeError(f"model must be a Transformers PreTrainedModel, got {type(model).__name__}: {hint}")
    _check_backend(backend)
    patch = model.__dict__.get(PATCH)
    attention = _attention_modules(model) if patch is None else patch.attention
    levels = list(getattr(attention[0], LEVELS, ()))
    previous = _previous(model, levels)
    model.set_attn_implementation(NAME)
    if patch is None:
        patch = Patch(model, backend, attention, previous)
        setattr(model, PATCH, patch)
        levels.append(patch)
        for module in attention:
            setattr(module, LEVELS, levels)
    patch.backend = backend
    for level in levels:
        level.previous = previous
    return model


def disable(model: Model) -> Model:
    """Gives `model` its previous attention back; returns the model. Does nothing where it was not enabled.

    Where an outer or inner model is enabled too, that one goes on, and the attention returns with the last of them.
    A model loaded with attn_implementation="c2c" gets Transformers' default.
    """
    patch = model.__dict__.get(PATCH)
    if patch is None:
        return model
    if patch.opened:
        raise RuntimeError("disable() inside a session: leave the session first")
    for hook in patch.hooks:
        hook.remove()
    del model.__dict__[PATCH]
    levels = [level for level in getattr(patch.attention[0], LEVELS) if level is not patch]
    for module in patch.attention:
        if levels:
            setattr(module, LEVELS, levels)
        else:
            delattr(module, LEVELS)
    if not levels and model.config._attn_implementation == NAME:
        model.set_attn_implementation(patch.previous)
    return model


@contextmanager
def session(model: PreTrainedModel, context: SharedContext | None) -> Iterator[SharedContext | None]:
    """Every forward pass of `model` inside reads `context`; sessions nest, and None means no context.

    Acts on `model(...)` and `model.generate(...)`, not on another model that `generate` calls (an assistant), and on
    the thread that opens it only: where a new thread runs `generate` (streaming), open the session in that thread.
    Sessions may end in any order (in generators); the innermost that is still open counts.
    """
    patch = _patch_of(model)
    if context is not None:
        _checked_context(context, "context")
    own, stacks = _Session(context), (patch.sessions.stack, patch.opened)
    for stack in stacks:
        stack.append(own)
    try:
        yield context
    finally:
        # The opening thread's stack, in whichever thread a generator ends.
        for stack in stacks:
            stack.remove(own)


@contextmanager
def record_mass(model: PreTrainedModel) -> Iterator[MassRecord]:
    """Records in every forward pass inside which share of attention the own tokens and each segment hold.

    Yields a `MassRecord`; `mass[layer]` grows by a tensor (batch, q_heads, q_len, 1 + segments) per call. Unlike a
    session it acts on every thread.
    """
    patch = _patch_of(model)
    previous, patch.record = patch.record, MassRecord(len(patch.attention))
    try:
        yield patch.record
    finally:
        patch.record = previous


def _patch_of(model: PreTrainedModel) -> Patch:
    patch = getattr(model, PATCH, None)
    if not isinstance(patch, Patch):
        raise ValueError(f"model ({type(model).__name__}) is not enabled: call enable(model) first")
    return patch


def _checked_context(context: Any, name: str) -> SharedContext:
    if not isinstance(context, SharedContext):
        raise TypeError(f"{name} must be a SharedContext, got {type(context).__name__}")
    return context


def _own_positions(kwargs: dict[str, Any], batch: int, q_len: int, device: torch.device) -> Tensor:
    """(batch or 1, q_len): the receiver's own positions, as given or as `generate` would compute them."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is not None:
        if positions.dim() == 1:
            positions = positions[None]
        if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != q_len:
            raise ValueError(
                f"position_ids must be (batch or 1, q_len) = ({batch}, {q_len}), got {tuple(positions.shape)}"
            )
        looks = mask is None and q_len > 1 and not torch.compiler.is_compiling()
        if looks and find_packed_sequence_indices(positions) is not None:
            raise ValueError(
                "position_ids jump, as in packed sequences, which are not supported with a context: "
                "pad the batch and pass its attention_mask"
            )
        return positions
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return (torch.arange(q_len, device=device) + past)[None]
    seen = mask.long().cumsum(-1) - 1
    seen = seen.masked_fill(mask == 0, 0)
    # A static cache counts in a tensor, which stays on its device in traces and CUDA graphs.
    if isinstance(past, Tensor):
        if past.device.type != "cpu" or torch.compiler.is_compiling():
            return seen.index_select(1, torch.arange(q_len, device=mask.device) + past.to(mask.device))
        past = int(past)
    if mask.shape[1] < past + q_len:
        raise ValueError(
            f"attention_mask must cover the {past} tokens in the cache and the {q_len} new ones, got {mask.shape[1]}"
        )
    return seen[:, past : past + q_len]


def _previous(model: PreTrainedModel, levels: list[Patch]) -> str:
    """The attention implementation to return to from merged attention."""
    current: str = model.config._attn_implementation
    if current != NAME:
        return current
    # Enabled already, inside or outside of this model, or loaded with the name.
    return levels[0].previous if levels else model.get_correct_attn_implementation(None)


def _windows(model: PreTrainedModel) -> list[int | None]:
    """Per layer the sliding window that the model's own mask has there, None for none."""
    config = model.config
    window = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is not None:
        return [window if kind == "sliding_attention" else None for kind in types]
    # Without layer types, models that make sliding masks at all make them for every layer.
    modules = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    slides = any(hasattr(module, "create_sliding_window_causal_mask") for module in modules)
    return [window if slides else None] * config.num_hidden_layers


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of every layer, in order; ValueError where the model cannot be served."""
    kind, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder: cross attention is not supported")
    if config.get_text_config() is not config:
        raise ValueError(f"{kind} has encoders beside its language model: enable the language model inside it")
    if not (model._can_set_attn_implementation() and model._supports_attention_backend):
        raise ValueError(f"{kind} does not call its attention through Transformers' AttentionInterface")
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(f"{kind}.forward does not take position_ids and **kwargs, which a context needs")
    others = set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if others:
        raise ValueError(f"{kind} has layers of type {sorted(others)}; supported are {list(_LAYER_TYPES)}")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(f"{kind} attends in chunks (attention_chunk_size), which is not supported")
    if getattr(config, "num_kv_shared_layers", None) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(f"{kind} shares keys and values between layers, which is not supported")
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    if not all(module.is_causal for module in found):
        raise ValueError(f"{kind} has attention that is not causal: encoders are not supported")
    if [module.layer_idx for module in found] != list(range(config.num_hidden_layers)):
        raise ValueError(
            f"{kind} has {config.num_hidden_layers} layers, but attention modules for layers "
            f"{[module.layer_idx for module in found]}"
        )
    return found


def _check_backend(backend: str | None) -> None:
    # Asked for in any case: finding out what the machine has cannot be traced by torch.compile later.
    records = {record.name: record for record in c2c.backends()}
    if backend is None:
        return
    if backend not in records:
        raise ValueError(f"backend must be one of {sorted(records)} or None, got {backend!r}")
    if not records[backend].available:
        raise ValueError(f"backend {backend!r} is not available here: {records[backend].reason}")
