"""`c2c-kernels demo --pair` and `--swap`: a model answers from the cache of one that shares nothing with it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from c2c_kernels.cli import evaluated, known_pairs, lengths, outputs, pair_facts, pairs
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.pair_documents import AskedDocument, choose, parts, shown
from c2c_kernels.cli.progress import stage

if TYPE_CHECKING:
    from c2c_kernels.cli.pair_report import Direction, LossRow, PairRow
    from c2c_kernels.evaluate import Reader

_SCORED = 129  # tokens of a document's end at most; the first is given
_SHORTEST = 16  # tokens of a context, below which a document is not cut
_BETWEEN = "\n\n"  # between the receiver's own document and the other


@dataclass(frozen=True)
class Role:
    """One direction that was asked for: a projector, its models, and which documents are read."""

    projector: Path
    sharer: str
    receiver: str
    document: AskedDocument
    own: AskedDocument | None
    mismatched: AskedDocument
    facts: bool  # whether those of made-up texts are asked for too


def asked_for(options: argparse.Namespace) -> bool:
    """Whether the demo is one of models that need a projector."""
    return options.swap or options.pair is not None or options.projector is not None


def run(options: argparse.Namespace, backend: str) -> int:
    """Runs the demo and prints its report; returns the exit status. `backend` is the name of the one that runs."""
    from c2c_kernels.cli import pair_report

    began = time.perf_counter()
    roles = _roles(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    known: dict[str, Any] = {}
    readers = [
        pairs.load_pair(
            str(role.projector), role.sharer, role.receiver, dtype=options.dtype, backend=options.backend, known=known
        )
        for role in roles
    ]
    for role, reader in zip(roles, readers, strict=True):
        _check_length(role, reader, options.max_new_tokens)
    try:
        found = [_Direction(role, reader, options).measure() for role, reader in zip(roles, readers, strict=True)]
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    outcome = pair_report.PairOutcome(
        options.dtype, torch.get_num_threads(), backend, found, time.perf_counter() - began
    )
    if options.json:
        print(json.dumps(pair_report.as_json(outcome), indent=2))
    else:
        pair_report.print_report(outcome)
    if options.plot:
        from c2c_kernels.cli import pair_plot

        try:
            with stage(f"draw {options.plot}"):
                pair_plot.draw(outcome, Path(options.plot))
        except OSError as error:
            raise outputs.unwritten("--plot", Path(options.plot), error) from error
    return 0


def _roles(options: argparse.Namespace) -> list[Role]:
    """What is to run. CommandError for what does not go together and for files that are missing."""
    if options.swap and options.pair is not None:
        raise CommandError("--pair and --swap: one of them is wanted; --swap runs both directions")
    given = options.projector or []
    count = 2 if options.swap else 1
    if given and len(given) != count:
        wanted = "two (there and back)" if options.swap else "one"
        raise CommandError(f"--projector was given {len(given)} times: {wanted} or none is wanted")
    if options.sharer is not None and len(options.sharer) > 1:
        raise CommandError(f"--sharer was given {len(options.sharer)} times: one is wanted with a projector")
    there = options.pair or "gemma3-smollm2"
    names = [there] if not options.swap else [there, "smollm2-gemma3"]
    projectors = [known_pairs.find(name, file) for name, file in zip(names, given or [None] * count, strict=True)]
    sharer = options.sharer[0] if options.sharer else known_pairs.PAIRS[there].sharer
    receiver = options.receiver or known_pairs.PAIRS[there].receiver
    *read, other = choose(options.document, options.question, count)
    if not options.swap:
        facts = options.document is None and options.question is None
        return [Role(projectors[0], sharer, receiver, read[0], None, other, facts)]
    return [
        Role(projectors[0], sharer, receiver, read[0], read[1], other, False),
        Role(projectors[1], receiver, sharer, read[1], read[0], other, False),
    ]


def _check_length(role: Role, reader: Reader, max_new_tokens: int) -> None:
    """CommandError where something that is to be read is longer than a model's context."""
    ours = reader.receiver_tokenizer
    before = 0 if role.own is None else len(ours(role.own.text + _BETWEEN, add_special_tokens=False).input_ids)
    for document in (role.document, role.mismatched):
        prompts = [parts(ours, document.text, asked) for asked in role.document.questions]
        lengths.check_asked(reader, document.name, document.text, prompts, max_new_tokens, before)


@dataclass(frozen=True)
class _Direction:
    """One direction at work."""

    role: Role
    reader: Reader
    options: argparse.Namespace

    def measure(self) -> Direction:
        """Asks for facts, reads, projects, answers in four ways, and scores the document's end."""
        from c2c_kernels.cli.pair_report import Direction

        role, reader = self.role, self.reader
        facts = pair_facts.ask_facts(reader) if role.facts else None
        with torch.inference_mode():
            with stage(f"{_short(role.sharer)} reads {role.document.name}"):
                caches = {"cache": self._read(role.document.text), "mismatched": self._read(role.mismatched.text)}
            head = self._with_own(parts(reader.receiver_tokenizer, role.document.text, role.document.questions[0]).head)
            contexts, projected = {}, {}
            for arm, (cache, _) in caches.items():
                document = role.document if arm == "cache" else role.mismatched
                began = time.perf_counter()
                contexts[arm] = self._project(document.text, cache, head)
                projected[arm] = time.perf_counter() - began
            if role.own is not None:
                contexts["none"] = contexts["text"] = reader.read(head)
            rows = self._answers(head, contexts)
            loss = self._loss(caches["mismatched"][0])
        cache, seconds = caches["cache"]
        segments = [layer[-1] for layer in contexts["cache"].layers]
        return Direction(
            sharer=role.sharer,
            receiver=role.receiver,
            projector=str(role.projector),
            document=role.document.name,
            mismatched=role.mismatched.name,
            own=None if role.own is None else role.own.name,
            tokens=cache.layers[0].keys.shape[2],
            seconds=seconds,
            project_seconds=projected["cache"],
            document_bytes=len(role.document.text.encode()),
            cache_bytes={arm: _bytes(_tensors(cache)) for arm, (cache, _) in caches.items()},
            projected_bytes=_bytes([tensor for segment in segments for tensor in (segment.key, segment.value)]),
            questions=rows,
            loss=loss,
            facts=facts,
            evaluated=evaluated.find(role.projector),
        )

    def _read(self, text: str) -> tuple[Any, float]:
        """The sharer's cache of a text, and how long the reading took."""
        from c2c_kernels.integrations.transformers import read_tokens

        began = time.perf_counter()
        return read_tokens(
            self.reader.sharer, self.reader.sharer_tokenizer(text).input_ids
        ), time.perf_counter() - began

    def _project(self, text: str, cache: Any, head: Sequence[int]) -> Any:
        from c2c_kernels.alignment import token_spans
        from c2c_kernels.integrations.transformers import read_tokens

        reader = self.reader
        theirs = token_spans(reader.sharer_tokenizer, text)
        ours = token_spans(reader.receiver_tokenizer, text, add_special_tokens=False)
        prefix = read_tokens(reader.receiver, head) if head else None
        return reader.projector.context(cache, theirs, ours, prefix=prefix, backend=self.options.backend)

    def _with_own(self, head: Sequence[int]) -> list[int]:
        """`head` and, after it, what the receiver has read itself."""
        return [*head, *([] if self.role.own is None else self._tokens(self.role.own.text + _BETWEEN))]

    def _tokens(self, text: str) -> list[int]:
        return list(self.reader.receiver_tokenizer(text, add_special_tokens=False).input_ids)

    def _answers(self, head: list[int], contexts: dict[str, Any]) -> list[PairRow]:
        from c2c_kernels.cli.answers import answer, attention_share
        from c2c_kernels.cli.pair_report import ARMS, PairRow
        from c2c_kernels.integrations.transformers import session

        reader, role, length = self.reader, self.role, self.options.max_new_tokens
        model, tokenizer = reader.receiver, reader.receiver_tokenizer
        text = self._tokens(role.document.text)
        rows: list[PairRow] = []
        with stage("answer in four ways", len(ARMS) * len(role.document.questions)) as update:
            for asked in role.document.questions:
                prompt = parts(tokenizer, role.document.text, asked)
                # its own document is read already, in every arm
                tokens = {"none": prompt.bare, "text": [*head, *text, *prompt.rest]}
                if role.own is not None:
                    tokens = {"none": prompt.rest, "text": [*text, *prompt.rest]}
                if not rows:
                    answer(model, tokenizer, prompt.bare, 2)  # the first call in a process is slower than the others
                given = {}
                for arm in ARMS:
                    with session(model, contexts.get(arm)):
                        given[arm] = answer(model, tokenizer, tokens.get(arm, prompt.rest), length)
                    update(len(rows) * len(ARMS) + len(given))
                context = contexts["cache"]
                share = attention_share(model, context, prompt.rest, given["cache"].tokens, segment=-1)
                rows.append(PairRow(asked, shown(tokenizer, asked), given, share))
        return rows

    def _loss(self, mismatched: Any) -> LossRow | None:
        """The document is cut: the receiver gets its beginning in four ways and is scored on its end."""
        from c2c_kernels.cli.pair_report import ARMS, LossRow
        from c2c_kernels.corpus import Document
        from c2c_kernels.evaluate import first_piece
        from c2c_kernels.integrations.transformers.continuation import continuation_loss

        reader, role = self.reader, self.role
        length = len(self._tokens(role.document.text))
        scored = min(_SCORED, length // 4)
        context = length - scored - _SHORTEST
        if context < _SHORTEST:
            return None
        piece = first_piece(
            Document(role.document.name, role.document.text, ""),
            reader.receiver_tokenizer,
            context=context,
            continuation=scored,
        )
        if piece is None:
            return None
        head = self._with_own(reader.projector.prefix)
        with stage(f"score the end of {role.document.name}", len(ARMS)):
            contexts = {
                "none": reader.read(head) if head else None,
                "text": reader.read([*head, *piece.context_ids]),
                "cache": self._project(piece.context, self._read(piece.context)[0], head),
                "mismatched": self._project(role.mismatched.text, mismatched, head),
            }
            tokens = len(piece.continuation_ids) - 1
            nats = {
                arm: float(continuation_loss(reader.receiver, contexts[arm], piece.continuation_ids)) / tokens
                for arm in ARMS
            }
        return LossRow(len(piece.context_ids), tokens, nats)


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _short(spec: str) -> str:
    return spec.rstrip("/").split("/")[-1]
