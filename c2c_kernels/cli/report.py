"""The demo's outcome as a record, for JSON, and as text for the terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from c2c_kernels.cli.answers import Answer

_BLOCKS = "▁▂▃▄▅▆▇█"
_DIGITS = "0123456789"  # where the terminal's encoding has no blocks


@dataclass(frozen=True)
class SharerRow:
    """What one sharer read and hands over."""

    model: str
    document: str
    document_bytes: int
    tokens: int
    seconds: float
    cache_bytes: int
    same_weights: bool


@dataclass(frozen=True)
class QuestionRow:
    """One question, its three answers, and (layers, heads, answer tokens) attention on the sharers."""

    question: str
    none: Answer
    text: Answer
    cache: Answer
    share: Tensor

    @property
    def identical(self) -> bool:
        """Whether the cache gave the very tokens that the text in the prompt gave."""
        return self.text.tokens == self.cache.tokens


@dataclass(frozen=True)
class Outcome:
    """Everything that the demo measured."""

    receiver: str
    origin: str
    dtype: str
    threads: int
    backend: str
    sharers: list[SharerRow]
    questions: list[QuestionRow]
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether the tokens have to be identical: one sharer, with the receiver's own weights."""
        return len(self.sharers) == 1 and self.sharers[0].same_weights

    @property
    def cache_bytes(self) -> int:
        return sum(sharer.cache_bytes for sharer in self.sharers)

    @property
    def document_bytes(self) -> int:
        return sum(sharer.document_bytes for sharer in self.sharers)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Plain data: times in seconds, sizes in bytes, attention shares per layer (mean over heads and tokens)."""
    return {
        "receiver": outcome.receiver,
        "origin": outcome.origin,
        "dtype": outcome.dtype,
        "threads": outcome.threads,
        "backend": outcome.backend,
        "sharers": [asdict(sharer) for sharer in outcome.sharers],
        "bytes_moved": {"none": 0, "text": outcome.document_bytes, "cache": outcome.cache_bytes},
        "identical_expected": outcome.exact,
        "questions": [
            {
                "question": row.question,
                "answers": {"none": asdict(row.none), "text": asdict(row.text), "cache": asdict(row.cache)},
                "identical": row.identical,
                "attention_share": [round(share, 4) for share in layer_shares(row.share)],
            }
            for row in outcome.questions
        ],
        "seconds": outcome.seconds,
    }


def layer_shares(share: Tensor) -> list[float]:
    """Mean over heads and answer tokens, layer by layer."""
    return share.mean(dim=(1, 2)).tolist()


def bar(shares: list[float], marks: str = _BLOCKS) -> str:
    """One character of `marks` for each layer: the first (the lowest block) is 0, the last (the full block) 1."""
    return "".join(marks[min(int(share * len(marks)), len(marks) - 1)] for share in shares)


def size(count: int) -> str:
    """Bytes in decimal units."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def print_report(outcome: Outcome) -> None:
    """The whole report on standard output."""
    from rich.console import Console
    from rich.text import Text

    # No markup: names, questions and answers stand as they are.
    console = Console(highlight=False, markup=False, emoji=False, width=None if Console().is_terminal else 100)
    console.print()
    console.print(
        Text("receiver", "bold"),
        f"{outcome.receiver}, from {outcome.origin}; {outcome.dtype}, {outcome.threads} threads, "
        f"kernels: {outcome.backend}",
    )
    for sharer in outcome.sharers:
        weights = "same weights" if sharer.same_weights else "other weights"
        console.print(
            Text("sharer  ", "bold"),
            f"{sharer.model} ({weights}) read {sharer.document}: {sharer.tokens} tokens in "
            f"{sharer.seconds:.1f} s, once for all questions",
        )
    for row in outcome.questions:
        _print_question(console, outcome, row)
    console.print()
    for line in _notes(outcome):
        console.print(line, style="dim")


def _print_question(console: Any, outcome: Outcome, row: QuestionRow) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(row.question, "bold"), title_justify="left", expand=True)
    table.add_column("")
    for heading in ("no context", "text in the prompt", "through the cache"):
        table.add_column(heading, ratio=1)
    arms = (row.none, row.text, row.cache)
    table.add_row("answer", *(" ".join(arm.text.split()) for arm in arms))
    table.add_row("first token", *(f"{arm.first_token_seconds:.2f} s" for arm in arms))
    rates = ("" if arm.tokens_per_second is None else f"{arm.tokens_per_second:.1f}" for arm in arms)
    table.add_row("tokens/s", *rates)
    table.add_row("prompt tokens", *(str(arm.prompt_tokens) for arm in arms))
    table.add_row("moved", "0 B", f"{size(outcome.document_bytes)} text", f"{size(outcome.cache_bytes)} cache")
    console.print()
    console.print(table)
    console.print("same tokens as with the text in the prompt:", Text.assemble(*_verdict(outcome, row)))
    shares = layer_shares(row.share)
    marks = _DIGITS if console.options.ascii_only else _BLOCKS
    drawn = bar(shares, marks)
    console.print(f"attention on the sharer, layer 0 to {len(shares) - 1}: {drawn} mean {_mean(shares):.0%}")


def _verdict(outcome: Outcome, row: QuestionRow) -> list[tuple[str, str]]:
    """Pieces of text, each with its style."""
    if row.identical:
        return [("yes", "green"), (f", all {len(row.text.tokens)}", "")]
    pairs = zip(row.text.tokens, row.cache.tokens, strict=False)
    agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(row.text.tokens), len(row.cache.tokens)))
    if outcome.exact:
        return [("no", "red"), (f", they part after {agreed} tokens", "")]
    promise = "equal ones are promised for one sharer with the same weights"
    return [(f"no, they part after {agreed} tokens ({promise})", "")]


def _notes(outcome: Outcome) -> list[str]:
    tokens = sum(sharer.tokens for sharer in outcome.sharers)
    notes = []
    if not all(sharer.same_weights for sharer in outcome.sharers):
        notes.append(
            "other weights: such a sharer's cache is read as it is, with no projector between the two models; "
            "nothing says that the answers are good."
        )
    return [
        *notes,
        f"first token: from the call to the first token. The text column reads the document each time; the cache "
        f"column does not count the sharer's reading ({sum(s.seconds for s in outcome.sharers):.1f} s, once).",
        f"moved: UTF-8 bytes of the document, or bytes of the keys and values of {tokens} tokens in all layers. "
        f"In this process the receiver reads them in place; no copy is made.",
        f"in all {outcome.seconds:.0f} s",
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
