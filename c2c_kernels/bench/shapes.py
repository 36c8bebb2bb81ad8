"""What is measured: models' shapes, cases, and the grid of them. bench/README.md says how the grid was chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = {
    "decode": "one token, own cache alone",
    "decode-layers": "one token, own cache, every layer's in turn, as in a model",
    "decode-materialised": "one token, own cache and a segment in receiver space",
    "decode-absorbed": "one token, own cache and a raw segment read through its projectors",
    "decode-int8": "the same, the segment stored as int8 with a scale for each token and head",
    "prefill": "many tokens, own cache alone, causal",
    "prefill-materialised": "many tokens, own cache and a segment in receiver space",
    "prefill-raw": 'many tokens and a raw segment, strategy="auto"; projection and concatenation count for all',
    "backward": "forward and backward: gradients of query, key and value",
    "backward-raw": "forward and backward with a raw segment: gradients of query, key, value and projectors",
    "project": "project_kv; one token: every layer's weights in turn",
    "project-int8": "project_kv from int8 storage",
    "merge": "merge_states",
    "fuse": "fuse_kv of one layer; one token: every layer's weights in turn",
    "fuse-model": "fuse_kv of every layer in one call",
}


@dataclass(frozen=True)
class Receiver:
    """Attention shape of a receiver."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    layers: int


@dataclass(frozen=True)
class Sharer:
    """Cache shape of a sharer."""

    name: str
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers in a token's keys (values)."""
        return self.heads * self.head_dim


QWEN3 = Receiver("Qwen3-0.6B", 16, 8, 128, 28)
SMOLLM2 = Receiver("SmolLM2-135M", 9, 3, 64, 30)
QWEN2_5 = Sharer("Qwen2.5-0.5B", 2, 64)
LLAMA3_2 = Sharer("Llama-3.2-1B", 8, 64)
QWEN3_4B = Sharer("Qwen3-4B", 8, 128)
GEMMA3 = Sharer("Gemma-3-270M", 1, 256)
RECEIVERS = (QWEN3, SMOLLM2)
_QWEN3_1_7B = Receiver("Qwen3-1.7B", 16, 8, 128, 28)
_QWEN3_8B = Receiver("Qwen3-8B", 32, 8, 128, 36)
# The pairs of the fusers that the paper's authors publish.
FUSED_PAIRS = (
    (QWEN3, QWEN2_5),
    (QWEN3, LLAMA3_2),
    (QWEN3, Sharer("Qwen2.5-Math-1.5B", 2, 128)),
    (QWEN3, QWEN3_4B),
    (QWEN3, Sharer("Qwen3-4B-Base", 8, 128)),
    (_QWEN3_1_7B, Sharer("Qwen2.5-1.5B", 2, 128)),
    (_QWEN3_8B, Sharer("Qwen2.5-7B", 4, 128)),
)
_WITH_FLEX = ("decode", "prefill")  # forward attention; compiling takes seconds for every shape
PAIRS = ((QWEN3, QWEN2_5), (QWEN3, LLAMA3_2), (QWEN3, QWEN3_4B), (SMOLLM2, GEMMA3))


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        family: a key of FAMILIES.
        receiver: whose attention it is.
        dtype: a key of DTYPES, of caches and queries.
        sharer: whose raw tokens are read; None where there are none.
        batch: rows.
        q_len: query tokens of a row.
        own: tokens in the own cache.
        shared: tokens of the sharer.
        layers: how many sets of inputs take turns.
        states: attention states to merge.
        flex: whether flex_attention, compiled for the shape, stands beside.
        compiled: whether torch.compile of the formula stands beside.
    """

    family: str
    receiver: Receiver
    dtype: str
    sharer: Sharer | None = None
    batch: int = 1
    q_len: int = 1
    own: int = 0
    shared: int = 0
    layers: int = 1
    states: int = 0
    flex: bool = False
    compiled: bool = False

    @property
    def gradients(self) -> bool:
        """Whether they are part of the work."""
        return self.family.startswith("backward")

    @property
    def label(self) -> str:
        """The shape in words, without the family."""
        models = self.receiver.name if self.sharer is None else f"{self.receiver.name} < {self.sharer.name}"
        parts = [models, self.dtype]
        for name in ("batch", "q_len", "own", "shared", "layers", "states"):
            value = getattr(self, name)
            if value != getattr(Case, name):
                parts.append(f"{name}={value}")
        return " ".join(parts)

    @property
    def name(self) -> str:
        """Family and shape; what `--filter` looks at."""
        return f"{self.family} {self.label}"


def grid(*, quick: bool = False, dtypes: Sequence[str] | None = None, text: str = "", gpu: bool = False) -> list[Case]:
    """The cases to measure, in the order of FAMILIES.

    Args:
        quick: the short list.
        dtypes: keys of DTYPES; None for all that the list has.
        text: words that all must be in a case's name, capitals or not.
        gpu: the short list has flex_attention in a few lines, which is made for GPUs.
    """
    cases = list(dict.fromkeys(_quick() if quick else _full()))
    if not quick:
        cases = [replace(case, flex=case.family.partition("-")[0] in _WITH_FLEX) for case in cases]
    elif gpu:
        cases = [replace(case, flex=case.family in _WITH_FLEX and case.dtype == "bfloat16") for case in cases]
    order = list(FAMILIES)
    cases = [case for case in cases if (dtypes is None or case.dtype in dtypes) and matches(case.name, text)]
    return sorted(cases, key=lambda case: order.index(case.family))


def without_compilation(cases: Iterable[Case]) -> list[Case]:
    """The same shapes without what torch compiles beside them, which takes far longer than to measure it."""
    return [replace(case, flex=False, compiled=False) for case in cases]


def matches(name: str, text: str) -> bool:
    """Whether every word of `text` is in `name`."""
    return all(word in name.lower() for word in text.lower().split())


def _each(case: Case, dtypes: Iterable[str] = DTYPES) -> Iterator[Case]:
    """`case` for both receivers and every dtype."""
    for receiver, dtype in product(RECEIVERS, dtypes):
        yield replace(case, receiver=receiver, dtype=dtype)


def _pairs(case: Case, dtypes: Iterable[str]) -> Iterator[Case]:
    """`case` for the four pairs of receiver and sharer and every dtype."""
    for (receiver, sharer), dtype in product(PAIRS, dtypes):
        yield replace(case, receiver=receiver, sharer=sharer, dtype=dtype)


def _all_layers(case: Case, receiver: Receiver, dtypes: Iterable[str] = DTYPES) -> Iterator[Case]:
    for dtype in dtypes:
        yield replace(case, receiver=receiver, dtype=dtype, layers=receiver.layers)


def _of(family: str, **shape: int) -> Case:
    return Case(family, QWEN3, "float32", **shape)  # type: ignore[arg-type]


def _quick() -> Iterator[Case]:
    low = ("float32", "bfloat16")
    yield from _each(_of("decode", own=4096), low)
    yield from _each(_of("decode", own=16384), ("float32", "bfloat16", "float16"))
    yield from _each(_of("decode", own=1024, batch=16), ("bfloat16",))
    yield from _all_layers(_of("decode-layers", own=1024), SMOLLM2, ("bfloat16",))
    yield from _each(_of("decode-materialised", own=512, shared=8192), low)
    yield from _pairs(_of("decode-absorbed", own=512, shared=16384), ("bfloat16",))
    yield from _pairs(_of("decode-int8", own=512, shared=16384), ("bfloat16",))
    yield from _each(_of("prefill", q_len=512, own=512), low)
    yield from _each(_of("prefill-materialised", q_len=512, own=512, shared=2048), ("bfloat16",))
    yield from _pairs(_of("prefill-raw", q_len=128, own=128, shared=2048), ("bfloat16",))
    yield from _each(_of("backward", q_len=512, own=512), low)
    yield from _pairs(_of("backward-raw", q_len=128, own=128, shared=1024), ("bfloat16",))
    for tokens in (1, 512):
        yield from _project(_of("project", shared=tokens), ("bfloat16",))
    yield from _pairs(_of("project-int8", shared=512), ("bfloat16",))
    yield from _each(_of("merge", q_len=512, states=2), ("float32",))
    yield _fused(_of("fuse", shared=64), QWEN3, QWEN3_4B, "float32")
    yield _fused(_of("fuse-model", shared=1), QWEN3, QWEN2_5, "bfloat16")


def _full() -> Iterator[Case]:
    low = ("float32", "bfloat16")
    for own in (256, 1024, 4096, 16384):
        yield from _each(_of("decode", own=own))
    for batch, own in ((4, 4096), (16, 1024)):
        yield from _each(_of("decode", own=own, batch=batch))
    for receiver in RECEIVERS:
        yield from _all_layers(_of("decode-layers", own=1024), receiver)
    for shared in (0, 2048, 8192, 32768):
        yield from _each(_of("decode-materialised", own=512, shared=shared))
    yield from _each(_of("decode-materialised", own=512, shared=2048, batch=16), low)
    for shared in (1024, 16384, 32768):
        yield from _pairs(_of("decode-absorbed", own=512, shared=shared), DTYPES if shared == 16384 else low)
    for batch in (4, 16):
        yield from _pairs(_of("decode-absorbed", own=512, shared=4096, batch=batch), ("bfloat16",))
    for shared in (4096, 16384):
        yield from _pairs(_of("decode-int8", own=512, shared=shared), DTYPES if shared == 16384 else low)
    for tokens in (128, 512, 2048):
        yield from _each(_of("prefill", q_len=tokens, own=tokens))
    yield from _each(_of("prefill", q_len=512, own=4096), low)
    for tokens, shared in ((128, 8192), (512, 2048), (2048, 2048)):
        case = _of("prefill-materialised", q_len=tokens, own=tokens, shared=shared)
        yield from _each(case, DTYPES if tokens == 512 else low)
    for tokens, shared in ((16, 2048), (128, 2048), (512, 4096), (2048, 2048)):
        case = _of("prefill-raw", q_len=tokens, own=tokens, shared=shared)
        yield from _pairs(case, DTYPES if tokens == 128 else low)
    for tokens in (128, 512, 2048):
        yield from _each(_of("backward", q_len=tokens, own=tokens), DTYPES if tokens == 512 else low)
    yield from _pairs(_of("backward-raw", q_len=512, own=512, shared=2048), low)
    for tokens in (1, 64, 512, 2048):
        yield from _project(_of("project", shared=tokens), DTYPES if tokens == 512 else low)
    yield from _pairs(_of("project-int8", shared=512), low)
    for states, tokens in ((2, 1), (2, 512), (8, 64)):
        yield from _each(_of("merge", q_len=tokens, states=states), low)
    yield from _fuse()


def _fused(case: Case, receiver: Receiver, sharer: Sharer, dtype: str) -> Case:
    """Whole models, and single layers at one token, have every layer's weights: those of one would stay cached."""
    whole = case.family == "fuse-model" or case.shared == 1
    return replace(case, receiver=receiver, sharer=sharer, dtype=dtype, layers=receiver.layers if whole else 1)


def _fuse() -> Iterator[Case]:
    """Every published pair; of a whole model with many tokens the smallest, as a call takes seconds."""
    for tokens, (receiver, sharer) in product((1, 64, 512, 2048), FUSED_PAIRS):
        for dtype in DTYPES if tokens == 64 else ("float32", "bfloat16"):
            case = replace(_of("fuse", shared=tokens), compiled=True)
            yield _fused(case, receiver, sharer, dtype)
    for (receiver, sharer), dtype in product(FUSED_PAIRS, ("float32", "bfloat16")):
        yield _fused(replace(_of("fuse-model", shared=1), compiled=True), receiver, sharer, dtype)
    for tokens, dtype in product((64, 512), DTYPES):
        yield _fused(replace(_of("fuse-model", shared=tokens), compiled=True), QWEN3, QWEN2_5, dtype)


def _project(case: Case, dtypes: Iterable[str]) -> Iterator[Case]:
    """At one token the weights are what is read: those of one layer would stay in the cache."""
    for each in _pairs(case, dtypes):
        yield replace(each, layers=each.receiver.layers) if case.shared == 1 else each
