"""`c2c-kernels questions`: questions whose answer stands in a text, to train on and to evaluate with."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from c2c_kernels import corpus
from c2c_kernels.cli import outputs, texts
from c2c_kernels.cli.errors import CommandError


def add_parser(commands: Any) -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "questions",
        help="make questions whose answer stands in a text, to train on and to evaluate with",
        description="Writes JSON lines of context, question and answer: about made-up texts that state facts (names, "
        "places, days, years, numbers, things), or, with --corpus, about real documents. Held-out ones share no "
        "phrasing, subject or answer with those to fit on.",
    )
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="where to write them")
    parser.add_argument("--split", choices=corpus.documents.SPLITS, default="fit", help="(fit)")
    parser.add_argument("--count", type=int, metavar="N", help="how many (made-up: 1000; real: all there are)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is made up (0)")
    parser.add_argument("--facts", type=int, default=6, metavar="N", help="stated in each made-up text (6)")
    parser.add_argument("--per-text", type=int, default=3, metavar="N", help="questions about each made-up text (3)")
    parser.add_argument("--corpus", metavar="TEXTS", help=f"ask about these instead: {texts.HELP}")


def run(options: argparse.Namespace) -> int:
    """Writes the questions and says what they are; returns the exit status."""
    path = Path(options.output)
    outputs.check("--output", path, ".jsonl")
    if options.count is not None and options.count < 1:
        raise CommandError(f"--count must be at least 1, got {options.count}")
    try:
        if options.corpus is not None:
            found = corpus.about(texts.documents(options.corpus, options.split))[: options.count]
        else:
            found = corpus.made_up(
                options.count or 1000,
                seed=options.seed,
                split=options.split,
                facts=options.facts,
                per_text=options.per_text,
            )
    except corpus.CorpusError as error:
        raise CommandError(str(error)) from error
    try:
        corpus.write_questions(found, path)
    except OSError as error:
        raise outputs.unwritten("--output", path, error) from error
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(q.kind for q in found).most_common())
    print(f"{len(found)} questions about {len({q.context for q in found})} texts: {kinds}")
    return 0
