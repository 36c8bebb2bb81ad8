"""What the demo of a pair measured, as records, as JSON and as text for the terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from c2c_kernels.cli import evaluated, pair_facts
from c2c_kernels.cli.answers import Answer
from c2c_kernels.cli.pair_documents import Asked
from c2c_kernels.cli.report import bar, layer_shares, size

if TYPE_CHECKING:
    from c2c_kernels.evaluate import AnswerResult

ARMS = ("none", "text", "cache", "mismatched")
HEADINGS = {
    "none": "no context",
    "text": "text in the prompt",
    "cache": "through the projected cache",
    "mismatched": "through a mismatched cache",
}
OWN = "own document only"  # the heading of "none" where the receiver has read something itself
_KINDS = ("gist", "fact")
_YES_NO = {True: "yes", False: "no", None: "not known"}
_DIGITS = "0123456789"  # where the terminal's encoding has no blocks


@dataclass(frozen=True)
class LossRow:
    """Loss of a document's end after its beginning.

    Attributes:
        context, continuation: receiver tokens before, and tokens that were scored.
        nats: per arm, nats per token.
    """

    context: int
    continuation: int
    nats: dict[str, float]

    def recovered(self, arm: str) -> float | None:
        """Share of the gap between `none` and `text` that the arm closes; None where the text does not help."""
        gap = self.nats["none"] - self.nats["text"]
        return (self.nats["none"] - self.nats[arm]) / gap if gap > 0 else None


@dataclass(frozen=True)
class PairRow:
    """One question: as it was put, its answers by arm, (layers, heads, answer tokens) attention on the projected."""

    asked: Asked
    shown: str
    answers: dict[str, Answer]
    share: Tensor


@dataclass(frozen=True)
class Direction:
    """What one sharer read and what one receiver made of it.

    Attributes:
        sharer, receiver: names.
        projector: its file.
        document, mismatched: names of what the sharer read.
        own: name of what the receiver has read itself before, None for nothing.
        tokens, seconds: of the sharer's reading of the document.
        project_seconds: of the projection into the receiver's space.
        document_bytes: UTF-8 bytes of the text.
        cache_bytes: of the sharer's keys and values in all layers, by arm.
        projected_bytes: of the projected keys and values in all layers.
        questions: answered.
        loss: None where the document is too short to be cut.
        facts: questions about made-up texts, as an evaluation asks them; None where another document was asked for.
        evaluated: what `c2c-kernels evaluate` wrote about the projector; None where that is not known.
    """

    sharer: str
    receiver: str
    projector: str
    document: str
    mismatched: str
    own: str | None
    tokens: int
    seconds: float
    project_seconds: float
    document_bytes: int
    cache_bytes: dict[str, int]
    projected_bytes: int
    questions: list[PairRow]
    loss: LossRow | None
    facts: AnswerResult | None
    evaluated: dict[str, Any] | None

    def right(self, arm: str, kind: str) -> tuple[int, int]:
        """How many answers to questions of this kind are right, of how many that can be told."""
        marks = [row.asked.right(row.answers[arm].text) for row in self.questions if row.asked.kind == kind]
        return sum(mark is True for mark in marks), sum(mark is not None for mark in marks)

    def moved(self, arm: str) -> str:
        if arm == "none":
            return "0 B"
        return f"{size(self.document_bytes)} text" if arm == "text" else f"{size(self.cache_bytes[arm])} cache"


@dataclass(frozen=True)
class PairOutcome:
    """Everything that the demo of a pair measured."""

    dtype: str
    threads: int
    backend: str
    directions: list[Direction]
    seconds: float


def as_json(outcome: PairOutcome) -> dict[str, Any]:
    """Plain data: times in seconds, sizes in bytes, losses in nats per token, attention shares per layer."""
    return {**_plain(outcome, "directions"), "directions": [_direction(found) for found in outcome.directions]}


def _direction(found: Direction) -> dict[str, Any]:
    from c2c_kernels.evaluate.results import without_nan

    moved = {"none": 0, "text": found.document_bytes, **found.cache_bytes}
    loss = found.loss
    return {
        **_plain(found, "questions", "loss", "cache_bytes", "facts", "evaluated"),
        "bytes_moved": moved,
        "questions": [
            {
                "question": row.shown,
                "kind": row.asked.kind,
                "wanted": list(row.asked.wanted),
                "answers": {
                    arm: {**asdict(given), "right": row.asked.right(given.text)} for arm, given in row.answers.items()
                },
                "attention_share": [round(share, 4) for share in layer_shares(row.share)],
            }
            for row in found.questions
        ],
        "loss": loss and {**asdict(loss), "recovered": {arm: loss.recovered(arm) for arm in ("cache", "mismatched")}},
        "facts": found.facts and without_nan(found.facts.as_json()),
        "evaluated": found.evaluated and evaluated.figures(found.evaluated),
    }


def _plain(record: Any, *without: str) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in without}


def print_report(outcome: PairOutcome) -> None:
    """The whole report on standard output."""
    from rich.console import Console
    from rich.text import Text

    # No markup: names, questions and answers stand as they are.
    console = Console(highlight=False, markup=False, emoji=False, width=None if Console().is_terminal else 110)
    for found in outcome.directions:
        console.print()
        console.print(Text(f"{found.receiver} answers from what {found.sharer} has read", "bold"))
        if found.facts is not None:
            _print_facts(console, found, found.facts)
            console.print()
            console.print("a longer text, which is none of those that questions are trained or evaluated on:")
        console.print(
            f"{found.sharer} read {found.document}: {found.tokens} tokens in {found.seconds:.1f} s, projected into the "
            f"receiver's space in {found.project_seconds:.1f} s, once for all questions (maps: {found.projector})"
        )
        if found.own is not None:
            console.print(f"{found.receiver} has read {found.own} itself")
        for row in found.questions:
            _print_question(console, found, row)
        _print_loss(console, found)
        for line in _right(found):
            console.print(line)
    console.print()
    for line in _notes(outcome):
        console.print(line, style="dim")


def _print_facts(console: Any, found: Direction, facts: AnswerResult) -> None:
    """Every question with its answers, how many are right, and what an evaluation found of more of them."""
    table = _table(f"facts of {len(facts.asked)} short made-up texts", found)
    for row in pair_facts.rows(facts):
        table.add_row(*row, end_section=True)
    console.print()
    console.print(table)
    if found.evaluated is None:
        console.print(f"no evaluation of {found.projector} is known: `c2c-kernels evaluate` makes one")
        return
    console.print("by `c2c-kernels evaluate`, on what neither fit nor training has seen, with 95% intervals:")
    for line in evaluated.lines(evaluated.figures(found.evaluated)):
        console.print(f"  {line}")


def _table(title: str, found: Direction) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, "bold"), title_justify="left", expand=True)
    table.add_column("")
    for arm in ARMS:
        table.add_column(OWN if arm == "none" and found.own is not None else HEADINGS[arm], ratio=1)
    return table


def _print_question(console: Any, found: Direction, row: PairRow) -> None:
    table = _table(row.shown, found)
    given = [row.answers[arm] for arm in ARMS]
    table.add_row("answer", *(" ".join(arm.text.split()) for arm in given))
    if row.asked.wanted:
        table.add_row("right", *(_YES_NO[row.asked.right(arm.text)] for arm in given))
    table.add_row("first token", *(f"{arm.first_token_seconds:.2f} s" for arm in given))
    rates = ("" if arm.tokens_per_second is None else f"{arm.tokens_per_second:.1f}" for arm in given)
    table.add_row("tokens/s", *rates)
    table.add_row("prompt tokens", *(str(arm.prompt_tokens) for arm in given))
    table.add_row("moved", *(found.moved(arm) for arm in ARMS))
    console.print()
    console.print(table)
    shares = layer_shares(row.share)
    drawn = bar(shares, _DIGITS) if console.options.ascii_only else bar(shares)
    mean = sum(shares) / len(shares)
    console.print(f"attention on the projected cache, layer 0 to {len(shares) - 1}: {drawn} mean {mean:.0%}")


def _print_loss(console: Any, found: Direction) -> None:
    console.print()
    if found.loss is None:
        console.print(f"{found.document} is too short to be cut: no loss of its end is measured")
        return
    loss = found.loss
    table = _table(f"the last {loss.continuation} tokens of {found.document} after its first {loss.context}", found)
    table.add_row("nats/token", *(f"{loss.nats[arm]:.3f}" for arm in ARMS))
    shares = [loss.recovered(arm) for arm in ARMS[2:]]
    table.add_row("gap recovered", "", "", *("" if share is None else f"{share:.0%}" for share in shares))
    console.print(table)


def _right(found: Direction) -> list[str]:
    """Per kind how many answers are right in each arm."""
    lines = []
    for kind in _KINDS:
        counted = {arm: found.right(arm, kind) for arm in ARMS}
        if any(of for _, of in counted.values()):
            named = {arm: HEADINGS[arm] for arm in ARMS}
            if found.own is not None:
                named["none"] = OWN
            said = ", ".join(f"{named[arm]} {right} of {of}" for arm, (right, of) in counted.items())
            lines.append(f"{kind} questions answered right: {said}")
    return lines


def _notes(outcome: PairOutcome) -> list[str]:
    return [
        "first token: from the call to the first token; the sharer's reading and the projection are not counted.",
        "moved: UTF-8 bytes of the document, or bytes of the sharer's keys and values in all layers.",
        "mismatched: the sharer has read another text; what stays right there was not read in the document.",
        f"{outcome.dtype}, {outcome.threads} threads, kernels: {outcome.backend}; in all {outcome.seconds:.0f} s",
    ]
