"""Answers with their timing, and where the attention went while one was written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: without special tokens.
        tokens: ids, an end token included.
        prompt_tokens: how many tokens the receiver read itself.
        first_token_seconds: from the start to the first token.
        tokens_per_second: over the tokens after the first; None where there is only one.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float | None


class _Clock:
    """A streamer that notes when each token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], max_new_tokens: int
) -> Answer:
    """The model's greedy continuation of `prompt`."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt])
    ends = _end_tokens(model, tokenizer)
    # A configuration of its own: the model's may ask for sampling, penalties or a length.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if ends else None
    )
    clock = _Clock()
    began = time.perf_counter()
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
    tokens = written[0, len(prompt) :].tolist()
    first, last = clock.times[1], clock.times[-1]
    return Answer(
        text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        tokens=tokens,
        prompt_tokens=len(prompt),
        first_token_seconds=first - began,
        tokens_per_second=(len(tokens) - 1) / (last - first) if len(tokens) > 1 else None,
    )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer; without a chat template, where a model does not know when to stop, a new line too."""
    end = model.generation_config.eos_token_id
    ends = list(end) if isinstance(end, (list, tuple)) else [tokenizer.eos_token_id if end is None else end]
    if not tokenizer.chat_template:
        line = tokenizer("\n", add_special_tokens=False).input_ids
        ends += line if len(line) == 1 else []
    return [token for token in ends if token is not None]


@torch.inference_mode()
def attention_share(
    model: PreTrainedModel, context: Any, rest: list[int], answered: list[int], *, segment: int | None = None
) -> Tensor:
    """(layers, heads, answer tokens) share of attention on the sharers while each answer token was written.

    With `segment`, on that segment of the context alone. One more forward pass over question and answer, so that
    recording does not weigh on the timing.
    """
    from c2c_kernels.integrations import transformers as c2c_hf

    with c2c_hf.session(model, context), c2c_hf.record_mass(model) as record:
        model(input_ids=torch.tensor([rest + answered[:-1]]), use_cache=False)
    mass = torch.stack([calls[0][0] for calls in record.mass])[:, :, -len(answered) :].float()
    return 1.0 - mass[..., 0] if segment is None else mass[..., 1:][..., segment]
