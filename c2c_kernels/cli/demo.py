"""`c2c-kernels demo`: one model answers questions about a text that only another one has read."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from c2c_kernels.backends import choose
from c2c_kernels.cli import documents as texts
from c2c_kernels.cli import outputs, pair_demo
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from c2c_kernels.cli.answers import Answer
    from c2c_kernels.cli.prompts import Prompt
    from c2c_kernels.cli.report import QuestionRow, SharerRow
    from c2c_kernels.cli.sharers import Reading

_PACKAGES = ("transformers", "accelerate", "gguf", "safetensors", "rich")


class Loaded(NamedTuple):
    """A model in memory; `spec` is what it was asked for by, `origin` where it came from."""

    spec: str
    origin: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def run(options: argparse.Namespace) -> int:
    """Runs the demo and prints its report; returns the exit status."""
    began = time.perf_counter()
    _check_packages((*_PACKAGES, "matplotlib") if options.plot else _PACKAGES)
    backend = _check_backend(options.backend, options.dtype)
    if options.plot:
        outputs.check("--plot", Path(options.plot), ".png")
    if pair_demo.asked_for(options):
        return pair_demo.run(options, backend)
    read = texts.read_documents(options.document)
    questions = texts.choose_questions(options.question, options.document is not None)
    portions = texts.deal(read, len(options.sharer or [""]))
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    from c2c_kernels.cli import report
    from c2c_kernels.cli.models import DEFAULT_MODEL

    receiver, sharers = _load(options.receiver or DEFAULT_MODEL, options.sharer, len(portions), options.dtype)
    shared, rows = _compare(receiver, sharers, portions, questions, options)
    outcome = report.Outcome(
        receiver=receiver.spec,
        origin=receiver.origin,
        dtype=options.dtype,
        threads=torch.get_num_threads(),
        backend=backend,
        sharers=shared,
        questions=rows,
        seconds=time.perf_counter() - began,
    )
    if options.json:
        print(json.dumps(report.as_json(outcome), indent=2))
    else:
        report.print_report(outcome)
    if options.plot:
        from c2c_kernels.cli import plot

        pieces = [[receiver.tokenizer.decode([token]) for token in row.cache.tokens] for row in rows]
        try:
            with stage(f"draw {options.plot}"):
                plot.draw(outcome, pieces, Path(options.plot))
        except OSError as error:
            raise outputs.unwritten("--plot", Path(options.plot), error) from error
    return 0


def _load(
    receiver_spec: str, sharer_specs: Sequence[str] | None, readings: int, dtype: str
) -> tuple[Loaded, list[Loaded]]:
    """The receiver, and for every reading its sharer: an instance of its own, whose weights may be the receiver's."""
    from c2c_kernels.cli.models import load_source, resolve
    from c2c_kernels.cli.sharers import check_fits, check_known, second_instance

    for spec in sharer_specs or ():
        check_known(spec, receiver_spec)
    source = resolve(receiver_spec)
    receiver = Loaded(receiver_spec, source.origin, *load_source(source, getattr(torch, dtype)))
    loaded = {source.path.resolve(): receiver}
    sharers = []
    for spec in sharer_specs or [receiver_spec]:
        source = resolve(spec)
        path = source.path.resolve()
        if path not in loaded:
            loaded[path] = Loaded(spec, source.origin, *load_source(source, getattr(torch, dtype)))
            check_fits(loaded[path].model, receiver.model, spec)
        found = loaded[path]
        sharers.append(found._replace(spec=spec, model=second_instance(found.model)))
    return receiver, sharers * (readings // len(sharers))


def _compare(
    receiver: Loaded,
    sharers: Sequence[Loaded],
    portions: Sequence[texts.Document],
    questions: Sequence[str],
    options: argparse.Namespace,
) -> tuple[list[SharerRow], list[QuestionRow]]:
    """Lets the sharers read and the receiver answer in all three ways."""
    from c2c_kernels.cli.answers import answer, attention_share
    from c2c_kernels.cli.prompts import build_prompt
    from c2c_kernels.cli.report import QuestionRow
    from c2c_kernels.integrations import transformers as c2c_hf

    model, tokenizer, length = receiver.model, receiver.tokenizer, options.max_new_tokens
    _check_servable(model, options.backend)
    whole = "\n\n".join(portion.text for portion in portions)
    prompts = [build_prompt(tokenizer, whole, question) for question in questions]
    _check_length(model, prompts, length)
    readings = _read(sharers, portions, questions[0])

    def ask(prompt: list[int]) -> Answer:
        given = answer(model, tokenizer, prompt, length)
        counts.append(1)
        update(len(counts))
        return given

    counts: list[int] = []
    with stage("answer in three ways", 3 * len(prompts)) as update:
        answer(model, tokenizer, prompts[0].bare, 2)  # the first call in a process is slower than the others
        none = [ask(prompt.bare) for prompt in prompts]
        text = [ask(prompt.prefix + prompt.rest) for prompt in prompts]
        context = c2c_hf.SharedContext.from_caches(
            *(reading.cache for reading in readings),
            positions=[torch.arange(reading.start, reading.start + reading.tokens) for reading in readings],
        )
        c2c_hf.enable(model, backend=options.backend)
        with c2c_hf.session(model, context):
            answer(model, tokenizer, prompts[0].rest, 2)
            cache = [ask(prompt.rest) for prompt in prompts]
        pairs = zip(prompts, cache, strict=True)
        shares = [attention_share(model, context, prompt.rest, given.tokens) for prompt, given in pairs]
    rows = [QuestionRow(*row) for row in zip(questions, none, text, cache, shares, strict=True)]
    return _sharer_rows(receiver, sharers, portions, readings), rows


def _read(sharers: Sequence[Loaded], portions: Sequence[texts.Document], question: str) -> list[Reading]:
    """What each sharer reads of its portion: the chat template's head and the text, never the question.

    The portions follow one another in the receiver's positions.
    """
    from c2c_kernels.cli.prompts import build_prompt
    from c2c_kernels.cli.sharers import read

    readings, start = [], 0
    for sharer, portion in zip(sharers, portions, strict=True):
        tokens = build_prompt(sharer.tokenizer, portion.text, question).prefix
        with stage(f"the sharer reads {portion.name}", len(tokens)) as update:
            readings.append(read(sharer.model, tokens, start, update))
        start += len(tokens)
    return readings


def _sharer_rows(
    receiver: Loaded, sharers: Sequence[Loaded], portions: Sequence[texts.Document], readings: Sequence[Reading]
) -> list[SharerRow]:
    from c2c_kernels.cli.report import SharerRow
    from c2c_kernels.cli.sharers import same_weights

    return [
        SharerRow(
            model=sharer.spec,
            document=portion.name,
            document_bytes=len(portion.text.encode()),
            tokens=reading.tokens,
            seconds=reading.seconds,
            cache_bytes=reading.cache_bytes,
            same_weights=same_weights(sharer.model, receiver.model),
        )
        for sharer, portion, reading in zip(sharers, portions, readings, strict=True)
    ]


def _check_packages(names: Sequence[str]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"demo needs {', '.join(missing)}: pip install 'c2c-kernels[demo]'")


def _check_backend(name: str | None, dtype: str) -> str:
    """The name of the backend that will run, asked for or chosen."""
    try:
        return choose("merged_attention", name, torch.device("cpu"), getattr(torch, dtype)).name
    except ValueError as error:
        raise CommandError(str(error)) from error


def _check_servable(model: PreTrainedModel, backend: str | None) -> None:
    """CommandError, before anything is read, where merged attention cannot serve the receiver."""
    from c2c_kernels.integrations import transformers as c2c_hf

    try:
        c2c_hf.disable(c2c_hf.enable(model, backend=backend))
    except (TypeError, ValueError) as error:
        raise CommandError(f"the receiver cannot be served: {error}") from error


def _check_length(model: PreTrainedModel, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    room = getattr(model.config, "max_position_embeddings", None)
    wanted = max(len(prompt.prefix) + len(prompt.rest) for prompt in prompts) + max_new_tokens
    if room is not None and wanted > room:
        raise CommandError(
            f"document, question and answer take {wanted} tokens ({len(prompts[0].prefix)} of them the document); "
            f"the receiver's context holds {room}: a shorter document is wanted"
        )
