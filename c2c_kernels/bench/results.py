"""What was measured, as records that become a table, a plot and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from c2c_kernels.bench.machine import Machine
from c2c_kernels.bench.timing import Timing

SCHEMA = 1


@dataclass(frozen=True)
class Beside:
    """An alternative on one line: its timing and how many times ours it takes, or why it is left out."""

    timing: Timing | None = None
    ratio: float | None = None
    left_out: str = ""


@dataclass(frozen=True)
class Line:
    """One case measured.

    Attributes:
        family, label, dtype: of the case.
        status: "ok", "wrong" (the result does not match the reference: not timed) or "left out".
        reason: why not "ok".
        timing: of ours.
        bytes, flops: what it costs at least.
        floor: seconds that the machine's limits allow.
        bound: which limit that is: "memory", "cache" or "compute".
        fraction: floor / median.
        beside: alternatives by name.
    """

    family: str
    label: str
    dtype: str
    status: str = "ok"
    reason: str = ""
    timing: Timing | None = None
    bytes: float = 0.0
    flops: float = 0.0
    floor: float = 0.0
    bound: str = ""
    fraction: float = 0.0
    beside: dict[str, Beside] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the case's."""
        return f"{self.family} {self.label}"


@dataclass(frozen=True)
class Choice:
    """What strategy="auto" chooses for one shape, and what it would have to.

    Attributes:
        label: the shape.
        predicted: seconds by strategy, of the cost model.
        measured: seconds by strategy, of the whole call.
        chosen: by the cost model.
        wrong: whether the other is faster beyond doubt.
    """

    label: str
    predicted: dict[str, float]
    measured: dict[str, float]
    chosen: str
    wrong: bool


@dataclass(frozen=True)
class Generation:
    """`generate` with one length of context, both ways.

    Attributes:
        label: model, dtype, context.
        model, dtype: of it.
        context: tokens of it; as text in the prompt for SDPA, as shared context for ours.
        tokens_per_second: by way, "sdpa" and "c2c", median over all tokens after the first.
        first_token: seconds by way.
        same_tokens: of how many new tokens, how many agree from the start.
        new_tokens: generated each time.
        left_out: why it was not measured.
    """

    label: str
    model: str
    dtype: str
    context: int
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    first_token: dict[str, float] = field(default_factory=dict)
    same_tokens: int = 0
    new_tokens: int = 0
    left_out: str = ""


@dataclass
class Report:
    """Everything of one run.

    Attributes:
        command: the arguments that repeat it.
        environment: see environment.collect.
        machine: its limits; `machine_after` those measured again at the end.
        lines, choices, generations: what was measured.
        wrong: what does not match the reference and was not timed: which, and by how much.
        notes: what was left out, and what a reader has to know.
        seconds: of the whole run.
    """

    command: str
    environment: dict[str, Any]
    machine: Machine
    machine_after: Machine | None = None
    lines: list[Line] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain data; times in seconds, sizes in bytes."""
        return {"schema": SCHEMA, **asdict(self)}
