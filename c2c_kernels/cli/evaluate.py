"""`c2c-kernels evaluate`: what a projector is worth on text that it was not fitted on."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_kernels import corpus
from c2c_kernels.cli import lengths, outputs, pairs, texts
from c2c_kernels.cli.asking import ANSWER_TOKENS, ask_all
from c2c_kernels.cli.cache import sha256
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import stage

if TYPE_CHECKING:
    from c2c_kernels.evaluate import AnswerResult, Evaluation, LossResult, Piece, Reader

_MADE_UP = "made-up"
_NONE = "none"


def add_parser(commands: Any) -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "evaluate",
        help="what a projector is worth on text that it was not fitted on, in five arms",
        description="Loss per token and answers to questions of the receiver alone, with the text, with the projected "
        "cache of a sharer that has read the text, with that of another text, and with noise. Intervals of 95% by "
        "resampling documents.",
    )
    pairs.add_arguments(parser)
    parser.add_argument(
        "--corpus",
        action="append",
        metavar="TEXTS",
        help="whose held-out documents to use (repeatable; default debian:handbook,fortunes; 'none': no losses): "
        f"{texts.HELP}",
    )
    parser.add_argument(
        "--questions",
        action="append",
        metavar="SET",
        help=f"'{_MADE_UP}' (held-out phrasings, names and numbers; the default), a .jsonl file of `c2c-kernels "
        f"questions`, 'debian:manual' and the like, or '{_NONE}' (repeatable)",
    )
    parser.add_argument("--pieces", type=int, default=60, metavar="N", help="contexts of each kind of text (60)")
    parser.add_argument("--context", type=int, default=480, metavar="N", help="receiver tokens of a context (480)")
    parser.add_argument("--continuation", type=int, default=129, metavar="N", help="tokens after it (129)")
    parser.add_argument("--most-questions", type=int, default=90, metavar="N", help="of each set (90)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of noise and made-up questions (0)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", metavar="FILE", help="write everything measured, the answers included")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the figures with their intervals")


def run(options: argparse.Namespace) -> int:
    """Evaluates and prints the figures; returns the exit status."""
    began = time.perf_counter()
    _check(options)
    documents = _documents(options)
    sets = _question_sets(options)
    if not documents and not sets:
        raise CommandError(f"--corpus {_NONE} and --questions {_NONE}: nothing is left to evaluate")
    unseen = [*documents, *(document for _, _, sources in sets for document in sources)]
    reader = pairs.load_pair(
        options.projector, options.sharer, options.receiver, unseen=unseen, threads=options.threads
    )

    from c2c_kernels.evaluate import Evaluation

    pieces = _pieces(reader, documents, options)
    _check_lengths(reader, pieces, sets, options)
    identities = {role: getattr(reader.projector, f"{role}_identity") for role in ("sharer", "receiver")}
    evaluation = Evaluation(
        {
            "projector": options.projector,
            "projector_sha256": sha256(Path(options.projector)),
            **{role: identity.name for role, identity in identities.items()},
            "hashes": {role: [identity.model, identity.tokenizer] for role, identity in identities.items()},
            "corpus": corpus.digest(documents),
            "context": options.context,
            "continuation": options.continuation,
            "seed": options.seed,
        }
    )
    for name, found in pieces.items():
        _score(reader, name, found, options, evaluation)
    for name, questions, _ in sets:
        _ask(reader, name, questions, options, evaluation)
    evaluation.about["seconds"] = time.perf_counter() - began
    print(f"took {evaluation.about['seconds']:.0f} s")
    _write(evaluation, options)
    return 0


def _check(options: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    for name, suffix in (("json", ""), ("plot", ".png")):
        if getattr(options, name) is not None:
            outputs.check(f"--{name}", Path(getattr(options, name)), suffix)
    for name, least in (("pieces", 2), ("context", 1), ("continuation", 2), ("most_questions", 2), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise CommandError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    pairs.check_file(options.projector)


def _documents(options: argparse.Namespace) -> list[corpus.Document]:
    """Held-out documents, in an order that depends on their texts alone."""
    specs = options.corpus or ["debian:handbook,fortunes"]
    found = {d.sha256: d for spec in specs if spec != _NONE for d in texts.documents(spec, "held-out")}
    return [found[sha256] for sha256 in sorted(found)]


def _question_sets(
    options: argparse.Namespace,
) -> list[tuple[str, list[corpus.Question], list[corpus.Document]]]:
    """Per set its name, its questions, and the documents that they were taken from."""
    sets = []
    for spec in options.questions or [_MADE_UP]:
        sources: list[corpus.Document] = []
        try:
            if spec == _NONE:
                continue
            if spec == _MADE_UP:
                found = corpus.made_up(options.most_questions, seed=options.seed, split="held-out")
            elif spec.endswith(".jsonl"):
                found = corpus.read_questions(spec)
                contexts = dict.fromkeys(question.context for question in found[: options.most_questions])
                sources = [corpus.Document(f"context {at}", text) for at, text in enumerate(contexts, 1)]
            else:
                sources = texts.documents(spec, "held-out")
                found = corpus.about(sources)
        except corpus.CorpusError as error:
            raise CommandError(f"--questions {spec}: {error}") from error
        found = found[: options.most_questions]
        if len({question.context for question in found}) < 2:
            raise CommandError(f"--questions {spec}: questions about at least 2 texts are wanted")
        sets.append((spec, found, sources))
    return sets


def _pieces(
    reader: Reader, documents: Sequence[corpus.Document], options: argparse.Namespace
) -> dict[str, list[Piece]]:
    """Per kind of text its pieces."""
    from c2c_kernels.evaluate import cut

    found = {}
    for name in sorted({document.collection for document in documents}):
        part = [document for document in documents if document.collection == name]
        try:
            pieces, short = cut(
                part,
                reader.receiver_tokenizer,
                context=options.context,
                continuation=options.continuation,
                most=options.pieces,
            )
        except ValueError as error:
            raise CommandError(f"--corpus, {name or 'documents'}: {error}") from error
        if short:
            print(f"{name or 'documents'}: {short} of {len(part)} documents are too short and left out")
        found[name or "documents"] = pieces
    return found


def _check_lengths(
    reader: Reader,
    pieces: dict[str, list[Piece]],
    sets: Sequence[tuple[str, list[corpus.Question], list[corpus.Document]]],
    options: argparse.Namespace,
) -> None:
    """CommandError where a context or a question is longer than a model's own."""
    from c2c_kernels.cli.prompts import split_prompt

    before = len(reader.projector.prefix)
    for name, found in pieces.items():
        what = f"--context {options.context}, {name}"
        for piece in found:
            lengths.check_read(reader, what, piece.context)
            tokens = before + len(piece.context_ids) + len(piece.continuation_ids)
            lengths.check_fits("receiver", reader.receiver, f"{what} and --continuation", tokens)
    for name, questions, _ in sets:
        for number, one in enumerate(questions, 1):
            prompt = split_prompt(reader.receiver_tokenizer, one.context, one.question)
            what = f"--questions {name}, the context of question {number}"
            lengths.check_asked(reader, what, one.context, [prompt], ANSWER_TOKENS)


def _score(
    reader: Reader, name: str, pieces: Sequence[Piece], options: argparse.Namespace, evaluation: Evaluation
) -> None:
    from c2c_kernels.evaluate import score

    with stage(f"loss on {name}", len(pieces)) as update:
        try:
            result = score(reader, pieces, name=name, seed=options.seed, update=update)
        except ValueError as error:
            raise CommandError(f"{name}: {error}") from error
    evaluation.losses.append(result)
    print(_loss_text(result), flush=True)


def _ask(
    reader: Reader, name: str, questions: Sequence[corpus.Question], options: argparse.Namespace, evaluation: Evaluation
) -> None:
    result = ask_all(reader, questions, name=name, seed=options.seed)
    evaluation.answers.append(result)
    print(_answer_text(result), flush=True)


def _loss_text(result: LossResult) -> str:
    from c2c_kernels.evaluate import ARMS

    lines = [f"{result.name}: {result.pieces} contexts of {len(result.documents)} documents", f"  {'':<11} nats/token"]
    for arm in ARMS:
        recovered = f"   gap recovered {result.recovered(arm):.1%}" if arm in ARMS[2:] else ""
        lines.append(f"  {arm:<11} {result.loss(arm):.3f}{recovered}")
    return "\n".join(lines)


def _answer_text(result: AnswerResult) -> str:
    from c2c_kernels.evaluate import ARMS

    lines = [f"questions, {result.name}: {int(result.asked.sum())} about {len(result.asked)} texts; answered right"]
    for arm in ARMS:
        relative = f"   of the text's {result.relative(arm):.1%}" if arm != "text" else ""
        exact = f"   nothing but the answer {result.accuracy(arm, exact=True).value:.1%}"
        lines.append(f"  {arm:<11} {result.accuracy(arm):.1%}{relative}{exact}")
    return "\n".join(lines)


def _write(evaluation: Evaluation, options: argparse.Namespace) -> None:
    if options.json is not None:
        content = json.dumps(evaluation.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
        try:
            Path(options.json).write_text(content + "\n", encoding="utf-8")
        except OSError as error:
            raise outputs.unwritten("--json", Path(options.json), error) from error
    if options.plot is not None:
        from c2c_kernels.evaluate import plot

        try:
            with stage(f"draw {options.plot}"):
                plot.draw(evaluation, Path(options.plot))
        except OSError as error:
            raise outputs.unwritten("--plot", Path(options.plot), error) from error
