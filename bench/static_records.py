"""What is known of a case without a GPU, as records that become JSON, Markdown and a check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


def products(ops: dict[str, int]) -> str:
    """Which matrix instructions were issued, of counts by name."""
    kinds = [kind for kind, start in (("wgmma", "wgmma.mma"), ("mma", "mma.")) if any(o.startswith(start) for o in ops)]
    return " + ".join(kinds)


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of the kernel.
        programs: of the simulated launch.
        warps, registers, spills, shared, resident_warps: as in offline.Usage, of the case's true shape.
        sectors: 32-byte sectors of global memory, loaded and stored.
        sectors_per_request: of a warp.
        sector_use: share of the sectors' bytes that were asked for.
        bank_conflicts: passes through the banks beyond the fewest possible, over requests to shared memory.
        products: "wgmma", "mma", both or "": the matrix instructions.
        flops: of matrix instructions.
        others: instructions per matrix instruction in the usual pass of the innermost loop, see sass.py; 0 where they
            were not counted.
    """

    name: str
    programs: int
    warps: int
    registers: int
    spills: int
    shared: int
    resident_warps: int
    sectors: int
    sectors_per_request: float
    sector_use: float
    bank_conflicts: float
    products: str
    flops: int
    others: float = 0.0


@dataclass(frozen=True)
class Figures:
    """One case on one architecture.

    Attributes:
        case, arch: which.
        cut: what was simulated where that is less than the case, "" elsewhere.
        problem: why there are no figures: the backend refuses the case, or its result is not the reference's.
        kernels: its launches in order.
        bytes_over_least: bytes of the sectors over those that have to be moved; what launches leave for each other
            counts on top.
        flops_over_least: FLOPs of matrix instructions over those of the formula; 0 where it has no products.
        backend: "triton" or "cuda".
    """

    case: str
    arch: int
    cut: str = ""
    problem: str = ""
    kernels: tuple[Kernel, ...] = ()
    bytes_over_least: float = 0.0
    flops_over_least: float = 0.0
    backend: str = "triton"

    def as_json(self) -> dict[str, Any]:
        """Plain data, without what only the CUDA kernels' figures have where it is not theirs."""
        data = asdict(self)
        for part, name in [(data, "backend"), *((kernel, "others") for kernel in data["kernels"])]:
            if part[name] in ("triton", 0.0):
                del part[name]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Figures:
        """The inverse of `as_json`."""
        return cls(**{**data, "kernels": tuple(Kernel(**kernel) for kernel in data["kernels"])})
