"""Hypothesis strategies for calls of `merged_attention`: every feature in combination with every other."""

from __future__ import annotations

import torch
from attention_cases import Plan, SegmentPlan
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 192, 256)


def segments(max_length: int = 200) -> st.SearchStrategy[SegmentPlan]:
    return st.builds(
        SegmentPlan,
        length=st.sampled_from([n for n in (0, 1, 5, 63, 64, 65, 130, 200) if n <= max_length]),
        heads=st.integers(1, 3),
        key_dim=st.sampled_from((8, 16, 24, 64)),
        value_dim=st.sampled_from((8, 16, 40)),
        projector=st.sampled_from(("none", "dense", "dense", "low_rank")),
        bias=st.booleans(),
        gate=st.sampled_from(("none", "scalar", "head", "token", "full", "zero", "some_zero")),
        lengths=st.booleans(),
        positions=st.sampled_from(("none", "shared", "shuffled")),
        visibility=st.sampled_from(("all", "causal")),
        index=st.sampled_from((False, False, False, True)),
        quantised=st.sampled_from((False, False, False, False, True)),
    )


def plans(max_length: int = 300, max_queries: int = 70) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        dtype=st.sampled_from(DTYPES),
        batch=st.sampled_from((1, 2, 3, 2, 1, 0)),
        kv_heads=st.integers(1, 3),
        group=st.sampled_from((1, 2, 4, 7)),
        q_len=st.sampled_from([n for n in (0, 1, 1, 2, 5, 17, 33, 70) if n <= max_queries]),
        length=st.sampled_from([n for n in (0, 1, 7, 63, 64, 65, 130, 300, 700) if n <= max_length]),
        head_dim=st.sampled_from(HEAD_DIMS),
        value_dim=st.sampled_from((16, 40, 64, 128)),
        is_causal=st.booleans(),
        window=st.sampled_from((None, None, 1, 3, 40)),
        segment_window=st.sampled_from((None, None, 5)),
        softcap=st.sampled_from((None, None, 2.0, 30.0)),
        sinks=st.booleans(),
        mask=st.sampled_from(("none", "none", "bool", "bool_heads", "additive")),
        lengths=st.booleans(),
        query_positions=st.booleans(),
        strategy=st.sampled_from(("auto", "absorb", "materialize")),
        strided=st.booleans(),
        segments=st.lists(segments(), max_size=3),
    )


seeds = st.integers(0, 2**31 - 1)
