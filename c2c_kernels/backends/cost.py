"""The cost model behind strategy="auto": bytes and FLOPs of absorbing a segment against materialising it.

Costs are per batch row, so that the choice, and with it every bit of a row's result, does not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..segment import SegmentTensors


@dataclass(frozen=True)
class Machine:
    """What a backend reaches: bandwidth in bytes/s, rate in FLOP/s. Only their ratio matters to the choice."""

    bandwidth: float
    rate: float

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """Roofline time of one pass."""
        return max(bytes_moved / self.bandwidth, flops / self.rate)


# Two cores of a server CPU. DDR bandwidth and FMA rate scale alike over cores and sizes of machine.
CPU = Machine(bandwidth=20e9, rate=160e9)


@dataclass(frozen=True)
class SegmentCost:
    """Seconds of both strategies for one segment, and which is taken."""

    absorb: float
    materialize: float

    @property
    def strategy(self) -> str:
        return "absorb" if self.absorb <= self.materialize else "materialize"


def _projector_size(proj: Tensor, proj_in: Tensor | None) -> int:
    return proj.numel() + (0 if proj_in is None else proj_in.numel())


def segment_cost(
    segment: SegmentTensors, q_heads: int, q_len: int, head_dim: int, value_dim: int, element_size: int,
    machine: Machine = CPU,
) -> SegmentCost:  # fmt: skip
    """Costs of a segment with both projectors for one call of `q_len` queries.

    absorb: read raw tokens once for all heads; 2 FLOPs per head, query and raw element; fold q and out through W.
    materialize: read raw tokens, one GEMM, write the projected cache, then attend to it at the receiver's width.
    """
    length = segment.length
    kv_heads = segment.key_proj.shape[0]
    key_width = segment.key.shape[1] * segment.key.shape[3]
    value_width = segment.value.shape[1] * segment.value.shape[3]
    raw_bytes = length * (key_width * segment.key.element_size() + value_width * segment.value.element_size())
    key_weights = _projector_size(segment.key_proj, segment.key_proj_in)
    value_weights = _projector_size(segment.value_proj, segment.value_proj_in)
    weight_bytes = key_weights * segment.key_proj.element_size() + value_weights * segment.value_proj.element_size()
    rows = q_heads * q_len
    absorb = machine.seconds(raw_bytes, 2 * rows * length * (key_width + value_width)) + machine.seconds(
        weight_bytes, 2 * rows * (key_weights + value_weights) / kv_heads
    )
    projected_bytes = length * kv_heads * (head_dim + value_dim) * element_size
    materialize = machine.seconds(
        raw_bytes + weight_bytes + projected_bytes, 2 * length * (key_weights + value_weights)
    ) + machine.seconds(projected_bytes, 2 * rows * length * (head_dim + value_dim))
    return SegmentCost(absorb, materialize)
