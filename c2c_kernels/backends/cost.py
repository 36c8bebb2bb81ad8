"""The cost model behind strategy="auto": bytes and FLOPs of absorbing a segment against materialising it.

Costs are per batch row, so that the choice, and with it every bit of a row's result, does not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..segment import SegmentTensors


@dataclass(frozen=True)
class Machine:
    """What a backend's kernels reach. Only ratios matter to the choice.

    Attributes:
        bandwidth: bytes/s out of memory.
        project: FLOP/s of the products that project tokens.
        attend: FLOP/s of attention over many rows, at most.
        stream: FLOP/s of attention over at most `stream_rows` rows, which reads tokens through registers.
        softmax_width: a score's exponential costs as much as this many multiply-adds, in keys and in values.
        stream_rows: see `stream`.
        fused: whether tokens that are projected stay in the cache until they are attended to; else they are written
            to memory and read again.
    """

    bandwidth: float
    project: float
    attend: float
    stream: float
    softmax_width: int
    stream_rows: int
    fused: bool = True

    def projecting(self, bytes_moved: float, flops: float) -> float:
        """Seconds of products with weights."""
        return max(bytes_moved / self.bandwidth, flops / self.project)

    def attending(self, bytes_moved: float, rows: int, tokens: int, width: int) -> float:
        """Seconds of `rows` query rows over `tokens` tokens of `width` elements (keys and values)."""
        rate = self.stream
        if rows > self.stream_rows:
            rate = min(self.attend, 1.5 * self.attend * width / (width + 2 * self.softmax_width))
        return max(bytes_moved / self.bandwidth, 2 * rows * tokens * width / rate)


# Fitted to `c2c-kernels bench --explain` on two cores with AVX-512: bench/README.md has the table. Bandwidth and
# arithmetic scale alike over cores and sizes of machine.
CPU = Machine(bandwidth=20e9, project=190e9, attend=150e9, stream=60e9, softmax_width=64, stream_rows=12)
# The same on two Zen 3 cores, which have AVX2 alone.
CPU_AVX2 = replace(CPU, bandwidth=30e9, project=95e9, attend=98e9, stream=65e9)
# An A100's published rates, half of them for attention; a GPU's products hide its exponentials at these widths.
GPU = Machine(
    bandwidth=1.5e12, project=200e12, attend=100e12, stream=100e12, softmax_width=0, stream_rows=64, fused=False
)
CPU_BFLOAT16 = replace(CPU, project=370e9)  # where bfloat16 is multiplied by dot products of pairs
CPU_TILES = replace(CPU, project=1000e9, attend=300e9, stream=120e9, stream_rows=16)  # where it is multiplied by AMX


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
    segment: SegmentTensors, q_heads: int, q_len: int, head_dim: int, value_dim: int, machine: Machine = CPU
) -> SegmentCost:
    """Costs of a segment with both projectors for one call of `q_len` queries.

    absorb: read raw tokens once for all heads, at the sharer's width; fold q and out through W.
    materialize: read raw tokens and project them, where the machine is `fused` a few hundred at a time, which stay in
    the cache for attention at the receiver's width.
    """
    length = segment.length
    kv_heads = segment.key_proj.shape[0]
    key_width = segment.key.shape[1] * segment.key.shape[3]
    value_width = segment.value.shape[1] * segment.value.shape[3]
    raw_bytes = length * (key_width * segment.key.element_size() + value_width * segment.value.element_size())
    key_weights = _projector_size(segment.key_proj, segment.key_proj_in)
    value_weights = _projector_size(segment.value_proj, segment.value_proj_in)
    weights = key_weights + value_weights
    weight_bytes = key_weights * segment.key_proj.element_size() + value_weights * segment.value_proj.element_size()
    rows = q_heads * q_len
    absorb = machine.projecting(weight_bytes, 2 * rows * weights / kv_heads)
    absorb += machine.attending(raw_bytes, rows, length, key_width + value_width)
    projected_bytes = 0
    if not machine.fused:
        projected_bytes = length * kv_heads * (head_dim + value_dim) * segment.key_proj.element_size()
    materialize = machine.projecting(raw_bytes + weight_bytes + projected_bytes, 2 * length * weights)
    materialize += machine.attending(projected_bytes, rows, length, head_dim + value_dim)
    return SegmentCost(absorb, materialize)
