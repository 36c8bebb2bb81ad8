"""`c2c-kernels train`: a fitted projector, trained on what follows a text and on questions about it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_kernels import corpus
from c2c_kernels.cli import outputs, pairs, texts, train_fuser
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import note, watch

if TYPE_CHECKING:
    from c2c_kernels.projectors import CacheProjector
    from c2c_kernels.training import Asked, Progress, TrainOptions

_MADE_UP, _RECALL = "made-up", "recall"
_MADE_UP_COUNT = 20_000
_LR, _DISTILL = 4e-4, 0.8


def add_parser(commands: Any) -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "train",
        help="train a fitted projector, or the paper's fuser, by gradients",
        description="Both models are frozen; the maps and gates of the projector are trained so that the receiver says "
        "what follows a text that only the sharer has read, and answers questions about it. With --fuser c2c both have "
        "read the text, and what is trained rewrites the receiver's cache. An interrupted run goes on "
        "where it was: give the same command again. `torchrun --nproc-per-node N -m c2c_kernels.cli train ...` runs "
        "N processes.",
    )
    pairs.add_arguments(
        parser, optional="what `c2c-kernels fit` wrote; with --fuser a fuser to go on from, where there is one"
    )
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", help="the trained projector, or fuser")
    parser.add_argument(
        "--corpus", action="append", metavar="TEXTS", help=f"plain text to train on (repeatable): {texts.HELP}"
    )
    parser.add_argument(
        "--questions",
        action="append",
        metavar="SET",
        help=f"questions to train on (repeatable): a .jsonl file of context, question and answer, '{_MADE_UP}' "
        f"(facts), or '{_RECALL}' (facts, and sentences said again)",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, metavar="N", help="how long to train")
    length.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    numbers: tuple[tuple[str, type, Any, str], ...] = (
        ("--batch", int, 1, "windows of text read at once"),
        ("--question-batch", int, 4, "texts with questions read at once"),
        ("--accumulate", int, 2, "such batches in a step"),
        ("--question-weight", float, 0.3, "share of the batches that are questions"),
        ("--repeat-weight", float, 0.0, "share of the other batches in which pieces of the text are said again"),
        ("--most-questions", int, _MADE_UP_COUNT, "of each set"),
        ("--bias-lr", float, 3e-3, "learning rate of the biases, in standard deviations; 0: they hold still"),
        ("--gate-lr", float, 1e-2, "learning rate of the gates; 0: they hold still"),
        ("--context", int, 480, "most receiver tokens read through the projector"),
        ("--continuation", int, 128, "tokens after it"),
        ("--match", float, 0.0, "weight of the error of projected keys and values"),
        ("--average", float, 0.0, "share in the result of the projector that it starts from"),
        ("--held-out", int, 8, "windows of each kind kept to look at in between"),
        ("--validations", int, 6, "how often"),
        ("--seed", int, 0, "of the order of texts, of cuts and of made-up questions"),
        ("--checkpoint-seconds", float, 120.0, "between two checkpoints"),
    )  # fmt: skip
    for name, kind, default, text in numbers:
        parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{text} ({default:g})")
    parser.add_argument(
        "--lr", type=float, metavar="N",
        help=f"learning rate of the maps, in whitened coordinates ({_LR:g}), or of a fuser ({train_fuser.LR:g})",
    )  # fmt: skip
    parser.add_argument(
        "--distill", type=float, metavar="N",
        help="weight of the divergence from the receiver that has read the text, the rest is cross-entropy "
        f"({_DISTILL:g}; none with --fuser)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the models (float32)")
    parser.add_argument("--backend", metavar="NAME", help="kernels to use (default: the fastest that runs here)")
    parser.add_argument(
        "--storage", choices=("float32", "bfloat16", "int8"), help="of matrices in the file (int8; a fuser's: float32)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of each process (default: torch's choice)"
    )
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object")
    train_fuser.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Trains and writes the file; returns the exit status."""
    output = Path(options.output)
    _check(options, output)
    documents = _documents(options)
    asked = _questions(options)
    if options.fuser:
        return train_fuser.run(options, documents, asked, output)
    with _processes() as first:
        projector = _train(options, documents, asked, output, first)
        if first:
            try:
                projector.save(output, storage=options.storage or "int8")
                output.with_name(output.name + ".checkpoint").unlink(missing_ok=True)
            except OSError as error:
                raise outputs.unwritten("--output", output, error) from error
            _report(options, projector, output)
    return 0


def _check(options: argparse.Namespace, output: Path) -> None:
    """What can be refused before anything is read."""
    outputs.check("--output", output, ".safetensors")
    if options.fuser:
        train_fuser.check(options)
    elif options.projector is None:
        raise CommandError("a projector file is wanted: what `c2c-kernels fit` wrote, or --fuser c2c to train a fuser")
    else:
        train_fuser.refuse(options)
        options.lr = _LR if options.lr is None else options.lr
        options.distill = _DISTILL if options.distill is None else options.distill
    if options.projector is not None:
        pairs.check_file(options.projector)
    if options.projector is not None and output.resolve() == Path(options.projector).resolve():
        raise CommandError(f"--output {output} is the projector to start from: another file is wanted")
    for name in ("threads", "most_questions"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not options.corpus and not options.questions:
        raise CommandError("--corpus or --questions is wanted: there is nothing to train on")


def _documents(options: argparse.Namespace) -> list[corpus.Document]:
    """Documents of the split to fit on, each text once."""
    found = {d.sha256: d for spec in options.corpus or () for d in texts.documents(spec, "fit")}
    return list(found.values())


def _questions(options: argparse.Namespace) -> list[corpus.Question]:
    found: list[corpus.Question] = []
    for spec in options.questions or ():
        try:
            if spec == _MADE_UP:
                found += corpus.made_up(options.most_questions, seed=options.seed, split="fit")
            elif spec == _RECALL:
                found += corpus.recalled(options.most_questions, seed=options.seed, split="fit")
            else:
                found += corpus.read_questions(spec)[: options.most_questions]
        except corpus.CorpusError as error:
            raise CommandError(f"--questions {spec}: {error}") from error
    return found


@contextmanager
def _processes() -> Iterator[bool]:
    """Joins the other processes that torchrun started; yields whether this is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(minutes=60))  # the others wait while one looks
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


def _settings(options: argparse.Namespace) -> TrainOptions:
    from c2c_kernels.training import TrainOptions

    names = [field.name for field in dataclasses.fields(TrainOptions) if field.name in options]
    least = min(TrainOptions.least_context, options.context)
    return TrainOptions(**{name: getattr(options, name) for name in names}, least_context=least)


def _train(
    options: argparse.Namespace,
    documents: Sequence[corpus.Document],
    questions: Sequence[corpus.Question],
    output: Path,
    first: bool,
) -> CacheProjector:
    from c2c_kernels.training import Examples, train_projector

    settings = _settings(options)
    _check_settings(options, settings)
    reader = pairs.load_pair(
        options.projector,
        options.sharer,
        options.receiver,
        threads=options.threads,
        dtype=options.dtype,
        maps="float32",
        backend=options.backend,
    )
    asked = [asked_of(reader.receiver_tokenizer, question) for question in questions]
    checkpoint = output.with_name(output.name + ".checkpoint")
    if first and checkpoint.exists():
        note(f"goes on from {checkpoint}")
    total = options.steps if options.minutes is None else 1000
    with watch("train", total if first else None) as show:
        try:
            return train_projector(
                reader.sharer,
                reader.receiver,
                reader.projector,
                Examples([document.text for document in documents], asked),
                sharer_tokenizer=reader.sharer_tokenizer,
                receiver_tokenizer=reader.receiver_tokenizer,
                options=settings,
                backend=options.backend,
                checkpoint=checkpoint,
                update=lambda progress: show(round(progress.done * total), *_lines(progress)),
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise CommandError(str(error)) from error


def _check_settings(options: argparse.Namespace, settings: TrainOptions) -> None:
    """What `TrainOptions.check` refuses, by the name of the option, before a model is loaded."""
    from c2c_kernels.projectors import CacheProjector

    try:
        settings.check(CacheProjector.load(options.projector))
    except ValueError as error:
        raise CommandError(str(error)) from error


def asked_of(tokenizer: Any, question: corpus.Question) -> Asked:
    from c2c_kernels.cli.prompts import answer_tokens, split_prompt
    from c2c_kernels.training import Asked

    parts = split_prompt(tokenizer, question.context, question.question)
    answer = answer_tokens(tokenizer, question.answer)
    return Asked(question.context, tuple(parts.head), tuple(parts.rest), tuple(answer))


def _lines(progress: Progress) -> tuple[str, str]:
    """What stands beside the bar, and what is worth a line of its own."""
    from c2c_kernels.training.validation import text_of

    short = f"loss {progress.loss:.3f}" if progress.step else ""
    found = "" if progress.held_out is None else f"step {progress.step}, {progress.seconds:.0f} s: "
    return short, found and found + text_of(progress.held_out or {})


def _report(options: argparse.Namespace, projector: CacheProjector, output: Path) -> None:
    facts = projector.facts["training"]
    size = output.stat().st_size
    if options.json:
        print(json.dumps({"output": str(output), "bytes": size, **facts}))
        return
    curve = facts["curve"]
    print(
        f"{output}: {size / 1e6:.1f} MB, {facts['steps']} steps in {facts['seconds']:.0f} s "
        f"({facts['processor_seconds']:.0f} s of processor time) over "
        f"{facts['tokens_scored']} tokens; loss {curve[0]['loss']:.3f} at first, {curve[-1]['loss']:.3f} at last"
    )
