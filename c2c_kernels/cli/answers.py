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
    end = model.generation_config.eos_token_id
    # A configuration of its own: the model's may ask for sampling, penalties or a length.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id if end is None else end,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
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


@torch.inference_mode()
def attention_share(model: PreTrainedModel, context: Any, rest: list[int], answered: list[int]) -> Tensor:
    """(layers, heads, answer tokens) share of attention on the sharers while each answer token was written.

    One more forward pass over question and answer, so that recording does not weigh on the timing.
    """
    from c2c_kernels.integrations import transformers as c2c_hf

    with c2c_hf.session(model, context), c2c_hf.record_mass(model) as record:
        model(input_ids=torch.tensor([rest + answered[:-1]]), use_cache=False)
    own = torch.stack([calls[0][0, :, :, 0] for calls in record.mass]).float()
    return 1.0 - own[:, :, -len(answered) :]
