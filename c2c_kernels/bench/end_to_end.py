"""`generate` of small models: text in the prompt for SDPA, the same text as shared context for us."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from c2c_kernels.bench.results import Generation
from c2c_kernels.bench.shapes import matches
from c2c_kernels.bench.work import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m")
WAYS = ("sdpa", "c2c")
_QUESTION = "\n\nWhat did the mayor cut the ribbon with? Tell the whole story in your own words.\n"


@dataclass(frozen=True)
class Plan:
    """What is generated: for every model and dtype one line for each number of context tokens."""

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    rounds: int


QUICK = Plan(MODELS[:1], ("float32",), (0, 1024), 16, 2)
FULL = Plan(MODELS, ("float32", "bfloat16"), (0, 1024, 4096, 8192), 32, 2)


def plan(*, quick: bool = False, dtypes: Sequence[str] | None = None) -> Plan:
    """The plan, for the dtypes asked for."""
    whole = QUICK if quick else FULL
    return whole if dtypes is None else replace(whole, dtypes=tuple(d for d in FULL.dtypes if d in dtypes))


def label(model: str, dtype: str, context: int) -> str:
    """What `--filter` looks at."""
    return f"generate {model.rpartition('/')[2]} {dtype} context={context}"


def lines(whole: Plan, text: str) -> list[tuple[str, str, int]]:
    """(model, dtype, context tokens) of the lines whose label has every word of `text`."""
    return [
        (model, dtype, context)
        for model in whole.models
        for dtype in whole.dtypes
        for context in whole.contexts
        if matches(label(model, dtype, context), text)
    ]


def run(
    whole: Plan, wanted: Sequence[tuple[str, str, int]], load: Callable[[str, torch.dtype], tuple[Any, Any]]
) -> Iterator[Generation]:
    """Measures the lines `wanted`; a model that cannot be had becomes lines that say why.

    Args:
        whole: how many tokens and rounds.
        wanted: of `lines`.
        load: from a model's name and dtype to model and tokenizer.
    """
    for model, dtype in dict.fromkeys((model, dtype) for model, dtype, _ in wanted):
        contexts = [context for m, d, context in wanted if (m, d) == (model, dtype)]
        try:
            loaded, tokenizer = load(model, getattr(torch, dtype))
        except Exception as error:  # whatever a broken package or a missing network raises
            reason = first_line(error)
            for context in contexts:
                yield Generation(label(model, dtype, context), model, dtype, context, left_out=reason)
            continue
        for context in contexts:
            line = Generation(label(model, dtype, context), model, dtype, context)
            try:
                loaded.set_attn_implementation("sdpa")
                line = _measure(loaded, tokenizer, line, whole)
            except Exception as error:  # of generate or of the patch: the other lines go on
                line = replace(line, left_out=f"{type(error).__name__}: {first_line(error)}")
            yield line


@torch.inference_mode()
def _measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, line: Generation, whole: Plan) -> Generation:
    question = list(tokenizer(_QUESTION, add_special_tokens=False).input_ids)
    text = _context(tokenizer, _fitting(model, line.context, len(question) + whole.new_tokens))
    prompts = {"sdpa": text + question, "c2c": question}
    context = _share(model, text)
    first: dict[str, list[float]] = {way: [] for way in WAYS}
    gaps: dict[str, list[float]] = {way: [] for way in WAYS}
    written: dict[str, list[int]] = {}
    for way in WAYS:
        with _attention(model, way, context):
            _generate(model, question, 2)
    for _ in range(whole.rounds):
        for way in WAYS:
            with _attention(model, way, context):
                tokens, times = _generate(model, prompts[way], whole.new_tokens)
            written[way] = tokens
            first[way].append(times[0])
            gaps[way] += [after - before for before, after in pairwise(times)]
    return replace(
        line,
        context=len(text),
        tokens_per_second={way: 1 / statistics.median(found) for way, found in gaps.items()},
        first_token={way: statistics.median(found) for way, found in first.items()},
        same_tokens=_agreement(written["sdpa"], written["c2c"]),
        new_tokens=whole.new_tokens,
    )


def _fitting(model: PreTrainedModel, wanted: int, rest: int) -> int:
    """As many tokens of context as the model's positions hold."""
    room = getattr(model.config, "max_position_embeddings", None)
    return wanted if room is None else min(wanted, room - rest)


def _context(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """`count` tokens of the demo's document, over and over."""
    from c2c_kernels.cli.documents import default_document

    tokens = list(tokenizer(default_document().text + "\n\n").input_ids)
    return (tokens * (count // len(tokens) + 1))[:count]


def _share(model: PreTrainedModel, text: list[int]) -> Any:
    """What the sharer, here the same model, has read, as a context; None for no text."""
    if not text:
        return None
    from c2c_kernels.cli.sharers import read
    from c2c_kernels.integrations import transformers as c2c_hf

    return c2c_hf.SharedContext.from_caches(read(model, text, 0, lambda done: None).cache)


@contextmanager
def _attention(model: PreTrainedModel, way: str, context: Any) -> Iterator[None]:
    """The model's attention while the block runs: SDPA alone, or the patch with the context."""
    from c2c_kernels.integrations import transformers as c2c_hf

    if way == "sdpa":
        yield
        return
    c2c_hf.enable(model)
    try:
        with c2c_hf.session(model, context):
            yield
    finally:
        c2c_hf.disable(model)


class _Clock:
    """A streamer that notes when each token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _generate(model: PreTrainedModel, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """`count` greedy tokens, and the seconds from the call to each of them."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt])
    config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    clock = _Clock()
    began = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
    return out[0, len(prompt) :].tolist(), [at - began for at in clock.times[1:]]


def _agreement(first: list[int], second: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
