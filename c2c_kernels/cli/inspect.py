"""`c2c-kernels inspect`: which of the sharer's words an answer drew on, layer by layer and head by head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_kernels.cli import documents, lengths, outputs, pairs
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import stage

if TYPE_CHECKING:
    from c2c_kernels.alignment import TokenSpans
    from c2c_kernels.evaluate import Reader
    from c2c_kernels.inspection import Look

_STRONGEST = 3


def add_parser(commands: Any) -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "inspect",
        help="show which of the sharer's words an answer drew on: PNG and one HTML page",
        description="The sharer reads a document, the receiver answers a question from its projected cache. Shown are "
        "the shares of attention that go to the sharer by layer and head, by layer and word, and by word of the "
        "answer, and the gates.",
    )
    pairs.add_arguments(parser)
    parser.add_argument("--document", metavar="FILE", help="what the sharer reads (default: one in the package)")
    parser.add_argument("--question", metavar="TEXT", help="what the receiver is asked")
    parser.add_argument("--png", metavar="FILE.png", help="draw the heat maps")
    parser.add_argument("--html", metavar="FILE.html", help="write the page, which needs no other file")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="length of the answer (40)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def run(options: argparse.Namespace) -> int:
    """Writes what was asked for and prints what each word of the answer drew on; returns the exit status."""
    for name, suffix in (("png", ".png"), ("html", ".html")):
        if getattr(options, name) is not None:
            outputs.check(f"--{name}", Path(getattr(options, name)), suffix)
    for name in ("max_new_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    pairs.check_file(options.projector)
    [document] = documents.read_documents(None if options.document is None else [options.document])
    asked = None if options.question is None else [options.question]
    question = documents.choose_questions(asked, options.document is not None)[0]
    reader = pairs.load_pair(options.projector, options.sharer, options.receiver, threads=options.threads)
    try:
        found, answer = _look(reader, document, question, options.max_new_tokens)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    print(_text(found, answer))
    _write(found, options)
    return 0


def _look(reader: Reader, document: documents.Document, question: str, length: int) -> tuple[Look, str]:
    """The record of an answer, and the answer without special tokens."""
    from c2c_kernels.alignment import token_spans
    from c2c_kernels.cli.answers import answer
    from c2c_kernels.cli.prompts import split_prompt
    from c2c_kernels.inspection import look
    from c2c_kernels.integrations.transformers import session

    projector, model, tokenizer = reader.projector, reader.receiver, reader.receiver_tokenizer
    prompt = split_prompt(tokenizer, document.text, question)
    lengths.check_asked(reader, document.name, document.text, [prompt], length)
    with stage(f"the sharer reads {document.name}"):
        context = reader.project(document.text, prompt.head)
    with stage("answer"), session(model, context):
        given = answer(model, tokenizer, prompt.rest, length)
    whose = tokenizer if projector.tokens == "receiver" else reader.sharer_tokenizer
    spans = token_spans(whose, document.text, add_special_tokens=projector.tokens == "sharer")
    gates = projector.gates()
    with stage("look at the attention"):
        found = look(
            model,
            context,
            prompt.rest,
            given.tokens,
            words=words(spans, document.text),
            pieces=[tokenizer.decode([token]) for token in given.tokens],
            gates=None if gates is None else gates.detach(),
            about={
                "receiver": projector.receiver_identity.name,
                "sharer": projector.sharer_identity.name,
                "document": document.name,
                "question": question,
            },
        )
    return found, given.text


def words(spans: TokenSpans, text: str) -> list[str]:
    """The text of every token that has some; of tokens that share a character the first has it."""
    found, before = [], None
    for group in spans.group:
        if group >= 0:
            start, end = spans.bounds[group]
            found.append("" if group == before else text[start:end])
            before = group
    return found


def _text(found: Look, answer: str) -> str:
    lines = [
        f"question: {found.about['question']}",
        f"answer: {answer}",
        f"attention on the sharer: {found.by_head.mean().item():.0%}",
    ]
    for piece, strongest, row in zip(found.answer, found.strongest(_STRONGEST), found.drawn_on, strict=True):
        drawn = ", ".join(f"{found.words[index]!r} {row[index].item():.1%}" for index in strongest)
        lines.append(f"  {piece!r:<16} drew most on {drawn}")
    return "\n".join(lines)


def _write(found: Look, options: argparse.Namespace) -> None:
    from c2c_kernels.inspection import draw, write_page

    for name, write in (("png", draw), ("html", write_page)):
        given = getattr(options, name)
        if given is not None:
            try:
                with stage(f"write {given}"):
                    write(found, Path(given))
            except OSError as error:
                raise outputs.unwritten(f"--{name}", Path(given), error) from error
