"""How the Triton tests bring their inputs to a device: nothing about a view changes."""

from __future__ import annotations

import torch
from attention_cases import Plan, SegmentPlan, build
from triton_device import change_each, copied, here, there

import c2c_kernels as c2c

CPU = torch.device("cpu")


def test_a_copied_view_keeps_strides_and_surroundings():
    whole = torch.randn(2, 5, 7, 9)
    for view in (whole, whole.transpose(1, 2)[:, 1:, 2:, 3:], whole[:, :1].expand(2, 4, 7, 9), whole[:0], whole.bool()):
        copy = copied(view, CPU)
        assert torch.equal(copy, view) and copy.stride() == view.stride() and copy.dtype == view.dtype
        assert copy.storage_offset() == view.storage_offset()
        assert copy.untyped_storage().nbytes() == view.untyped_storage().nbytes()
        assert (
            copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
            or not view.untyped_storage().nbytes()
        )


def test_whole_calls_are_copied():
    parts = [SegmentPlan(9, 2, 8, 16, "low_rank", gate="head"), SegmentPlan(5, index=True, quantised=True)]
    call = build(Plan(torch.bfloat16, lengths=True, segments=parts), 3)
    copy = change_each(call, lambda tensor: copied(tensor, CPU))
    assert copy.keys() == call.keys() and copy["is_causal"] is call["is_causal"]
    assert torch.equal(copy["query"], call["query"]) and copy["query"] is not call["query"]
    for one, other in zip(copy["segments"], call["segments"], strict=True):
        assert isinstance(one, c2c.SharerSegment)
        assert isinstance(one.key_proj, type(other.key_proj))
    torch.testing.assert_close(
        c2c.merged_attention(*_positional(copy)), c2c.merged_attention(*_positional(call)), rtol=0, atol=0
    )


def _positional(call: dict) -> tuple:
    return call["query"], call["key"].nan_to_num(), call["value"].nan_to_num(), call["segments"]


def test_rope_tables_and_named_tuples_are_gone_through():
    rope = c2c.Rope(remove=(torch.ones(1), torch.zeros(1)))
    copy = change_each(rope, lambda tensor: copied(tensor, CPU))
    assert isinstance(copy, c2c.Rope) and torch.equal(copy.remove[0], rope.remove[0]) and copy.apply is None
    assert there(rope, CPU) is rope
    assert here([torch.ones(1)])[0].device == CPU
