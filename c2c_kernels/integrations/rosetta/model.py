"""A receiver whose cache is fused with those of sharers, section by section, on today's Transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from c2c_kernels.fusers import MODES, C2CFuser, Mode, fuse_caches

NOBODY = -1  # a section that no sharer is fused into
_FUSED = "the fused cache is used"
_DRAFTS = "Transformers' decoding from drafts does not go on from a cache that holds the prompt"
# What Transformers' generate cannot be told, and why.
_REFUSED = {
    "past_key_values": _FUSED, "cache_implementation": _FUSED, "inputs_embeds": _FUSED,
    "assistant_model": _DRAFTS, "assistant_early_exit": _DRAFTS, "prompt_lookup_num_tokens": _DRAFTS,
}  # fmt: skip


class Section(NamedTuple):
    """Consecutive tokens of the prompt.

    Attributes:
        length: in tokens.
        sharers: bit i: sharer i + 1 is fused into them; -1 or 0: none.
    """

    length: int
    sharers: int


class Prefilled(NamedTuple):
    """What a prompt leaves.

    Attributes:
        cache: of the receiver, fused.
        logits: (batch, tokens of the last section, vocabulary).
    """

    cache: DynamicCache
    logits: Tensor


class C2CModel(nn.Module):
    """A receiver, its sharers and their fusers.

    Every sharer reads the prompt too; the sections of it that a sharer is fused into are rewritten in the receiver's
    cache before the receiver reads on. The last section is never fused.

    Args:
        receiver: a causal language model of Transformers.
        sharers: sharer 1, 2, ...
        fusers: by the number of their sharer, as `load_checkpoint` gives them, or a list for sharers 1, 2, ...
        mode: several sharers in a section: "parallel" or "sequential", see `fuse_caches`.
        include_response: the last section and every generated token is fused too while the receiver reads it, with
            the only sharer.
        backend: of `fuse_kv`.

    Raises:
        ValueError: where a fuser does not fit its models.
    """

    def __init__(
        self,
        receiver: PreTrainedModel,
        sharers: Sequence[PreTrainedModel],
        fusers: Mapping[int, C2CFuser] | Sequence[C2CFuser],
        *,
        mode: Mode = "parallel",
        include_response: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        by_number = dict(fusers) if isinstance(fusers, Mapping) else dict(enumerate(fusers, 1))
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        if not by_number or not all(1 <= number <= len(sharers) for number in by_number):
            raise ValueError(f"fusers are for sharers {sorted(by_number)}, wanted some of 1..{len(sharers)}")
        if include_response and (len(sharers) != 1):
            raise ValueError(f"include_response takes one sharer, got {len(sharers)}")
        for number, fuser in by_number.items():
            fuser.check_models(receiver, sharers[number - 1])
        self.receiver, self.sharers = receiver, nn.ModuleList(sharers)
        self.fusers = nn.ModuleDict({str(number): fuser for number, fuser in sorted(by_number.items())})
        self.mode, self.include_response, self.backend = mode, include_response, backend

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor | Sequence[Tensor],
        sections: Sequence[tuple[int, int]] | None = None,
        attention_mask: Tensor | Sequence[Tensor] | None = None,
    ) -> Prefilled:
        """Reads a prompt.

        Args:
            input_ids: (batch, len) for all models, or a list: the receiver's, then every sharer's, all of one length.
            sections: (length, sharers) covering the prompt; None: everything but the last token with all sharers.
            attention_mask: like input_ids, 0 for padding, which is on the left.
        """
        prompt = self._prompt(input_ids, sections, attention_mask)
        cache = self._fused(prompt)
        length = prompt.sections[-1].length
        stop = prompt.ids[0].shape[1]
        with self._responding(prompt, cache):
            out = self.receiver(
                input_ids=prompt.ids[0][:, stop - length :], attention_mask=prompt.masks[0],
                position_ids=_positions(prompt.masks[0])[:, stop - length :], past_key_values=cache.cache,
            )  # fmt: skip
        return Prefilled(cache.cache, out.logits)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        sections: Sequence[tuple[int, int]] | None = None,
        attention_mask: Tensor | Sequence[Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """`receiver.generate` on the fused cache; returns what that returns.

        Args:
            input_ids, sections, attention_mask: see `prefill`.
            options: of Transformers' generate: max_new_tokens, do_sample, num_beams, ... The cache is used even where
                a generation_config or the receiver's own says use_cache=False.

        Raises:
            ValueError: for use_cache=False, for options (here or in a generation_config) that bring a cache of their
                own or decode from drafts, and with include_response for beams.
        """
        config = options.get("generation_config") or self.receiver.generation_config
        if options.get("use_cache") not in (None, True):
            raise ValueError(f"use_cache={options['use_cache']} cannot be given: {_FUSED}")
        for name, why in _REFUSED.items():
            for where, value in ((name, options.get(name)), (f"generation_config.{name}", getattr(config, name, None))):
                if value is not None:
                    raise ValueError(f"{where} cannot be given: {why}")
        prompt = self._prompt(input_ids, sections, attention_mask)
        rows = 1
        for name in ("num_beams", "num_return_sequences"):
            rows = max(rows, options.get(name) or getattr(config, name, None) or 1)
        if self.include_response and rows > 1:
            raise ValueError(f"include_response takes one beam and one sequence per prompt, got {rows}")
        cache = self._fused(prompt)
        if rows > 1:
            cache.cache.batch_repeat_interleave(rows)
        if options.get("generation_config") is None:
            options["use_cache"] = True
        else:  # with a configuration an option of its own is deprecated
            options["generation_config"] = config = copy.copy(config)
            config.use_cache = True
            options.pop("use_cache", None)
        options["past_key_values"] = cache.cache
        with self._responding(prompt, cache):
            return self.receiver.generate(prompt.ids[0], attention_mask=prompt.masks[0], **options)

    def _prompt(self, input_ids: Any, sections: Any, attention_mask: Any) -> _Prompt:
        """The arguments, checked."""
        models = 1 + len(self.sharers)
        ids = [input_ids] * models if isinstance(input_ids, Tensor) else list(input_ids)
        if len(ids) != models:
            raise ValueError(f"input_ids has {len(ids)} entries, wanted the receiver's and one per sharer ({models})")
        if attention_mask is None:
            masks = [torch.ones_like(x) for x in ids]
        else:
            masks = [attention_mask] * models if isinstance(attention_mask, Tensor) else list(attention_mask)
        if len(masks) != models:
            raise ValueError(f"attention_mask has {len(masks)} entries, wanted {models} like input_ids")
        for number, (tokens, mask) in enumerate(zip(ids, masks, strict=True)):
            if tokens.dim() != 2 or tokens.shape != ids[0].shape or mask.shape != tokens.shape:
                raise ValueError(
                    f"model {number} has input_ids {tuple(tokens.shape)} and attention_mask {tuple(mask.shape)}, "
                    f"wanted both (batch, len) = {tuple(ids[0].shape)}"
                )
            if bool((mask[:, 1:] < mask[:, :-1]).any()):
                raise ValueError(f"attention_mask of model {number} has padding after a token: padding goes left")
        length = ids[0].shape[1]
        every = sum(1 << (int(number) - 1) for number in self.fusers)
        if sections is None:
            sections = [(length - 1, every), (1, NOBODY)] if length > 1 else [(length, NOBODY)]
        made = [Section(*section) for section in sections]
        if not made or any(part.length < 1 for part in made) or sum(part.length for part in made) != length:
            raise ValueError(f"sections have lengths {[part.length for part in made]}, wanted positive, sum {length}")
        for part in made[:-1]:
            if part.sharers > 0 and part.sharers & ~every:
                raise ValueError(f"sections name sharers {part.sharers:#b}, there are fusers for {every:#b}")
        return _Prompt(ids, masks, made)

    def _fused(self, prompt: _Prompt) -> _Caches:
        """The receiver's cache after all sections but the last, and those of the sharers."""
        *earlier, last = prompt.sections
        stop = prompt.ids[0].shape[1] - last.length
        used = [0] * len(self.sharers)  # a sharer reads up to the last token that it is fused into
        at = 0
        for part in earlier:
            at += part.length
            used = [at if part.sharers > 0 and part.sharers >> i & 1 else end for i, end in enumerate(used)]
        if self.include_response:
            used = [stop] * len(used)
        read = [_read(model, prompt, number + 1, used[number]) for number, model in enumerate(self.sharers)]
        caches = _Caches(_Replacing(), DynamicCache(), read)
        at = 0
        for part in earlier:
            end = at + part.length
            self.receiver.get_decoder()(
                input_ids=prompt.ids[0][:, at:end], attention_mask=prompt.masks[0][:, :end],
                position_ids=_positions(prompt.masks[0])[:, at:end], past_key_values=caches.cache,
            )  # fmt: skip
            if self.include_response and end == stop:
                _copy_into(caches.plain, caches.cache)
            fused = [
                (fuser, read[int(number) - 1])
                for number, fuser in self.fusers.items()
                if part.sharers > 0 and part.sharers >> (int(number) - 1) & 1
            ]
            if fused:
                fuse_caches(caches.cache, fused, at, end, mode=self.mode, backend=self.backend)  # type: ignore[arg-type]
            at = end
        return caches

    @contextmanager
    def _responding(self, prompt: _Prompt, caches: _Caches) -> Iterator[None]:
        """While open, with include_response, what the receiver reads is fused before it attends to it."""
        if not self.include_response:
            yield
            return
        fuser = cast("C2CFuser", next(iter(self.fusers.values())))
        streams: list[tuple[Any, DynamicCache, Tensor]] = [
            (self.receiver, caches.plain, prompt.masks[0]),
            (self.sharers[0], caches.sharers[0], prompt.masks[1]),
        ]

        def before(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
            ids = keywords["input_ids"]
            count, held = ids.shape[1], caches.plain.get_seq_length()
            for model, cache, mask in streams:
                more = mask.new_ones(mask.shape[0], max(0, held + count - mask.shape[1]))
                mask = torch.cat([mask, more], dim=1)
                positions = _positions(mask)[:, held : held + count]
                model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            replacement = [(key.clone(), value.clone()) for key, value in _since(caches.plain, held)]
            raw = _since(caches.sharers[0], held)
            fuse_caches(replacement, [(fuser, raw)], backend=self.backend)
            caches.cache.replacement = replacement

        handle = self.receiver.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            caches.cache.replacement = None


class _Prompt(NamedTuple):
    """Ids and masks of the receiver and of every sharer, and the sections."""

    ids: list[Tensor]
    masks: list[Tensor]
    sections: list[Section]


class _Replacing(DynamicCache):
    """A cache that, where it has a replacement, stores and returns that for the next tokens of every layer."""

    replacement: list[tuple[Tensor, Tensor]] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *arguments: Any, **keywords: Any) -> Any:
        if self.replacement is not None:
            key, value = self.replacement[layer_idx]
            key_states, value_states = key.to(key_states.dtype), value.to(value_states.dtype)
        return super().update(key_states, value_states, layer_idx, *arguments, **keywords)


class _Caches(NamedTuple):
    """The receiver's cache, one that no response is fused into, and the sharers'."""

    cache: _Replacing
    plain: DynamicCache
    sharers: list[DynamicCache]


def _positions(mask: Tensor) -> Tensor:
    """(batch, len) positions that do not count padding on the left."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _read(model: Any, prompt: _Prompt, number: int, stop: int) -> DynamicCache:
    """The cache of a sharer that has read the prompt's first `stop` tokens."""
    cache = DynamicCache()
    if stop:
        mask = prompt.masks[number][:, :stop]
        ids = prompt.ids[number][:, :stop]
        model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=_positions(mask), past_key_values=cache)
    return cache


def _since(cache: DynamicCache, start: int) -> list[tuple[Tensor, Tensor]]:
    """Per layer what follows the first `start` tokens."""
    return [(layer.keys[:, :, start:], layer.values[:, :, start:]) for layer in cache.layers]


def _copy_into(target: DynamicCache, source: DynamicCache) -> None:
    for number, layer in enumerate(source.layers):
        target.update(layer.keys.clone(), layer.values.clone(), number)
