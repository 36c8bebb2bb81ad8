"""`c2c-kernels fit`: maps between the caches of two models, in closed form."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from c2c_kernels.cli import known_pairs, outputs, texts
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.models import load_model
from c2c_kernels.cli.progress import note, stage

_LABELS = {"read": "read and sum", "solve": "choose layers and solve", "stretch": "stretch keys"}


def run(options: argparse.Namespace) -> int:
    """Fits and writes the file. An interrupted run goes on from its checkpoint beside the output."""
    from c2c_kernels.fitting import FitOptions, fit_projector

    _complete(options)
    output = Path(options.output)
    outputs.check("--output", output, ".safetensors")
    documents = [document for spec in options.corpus for document in texts.documents(spec, "fit")]
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = FitOptions(
        layers_read=options.layers,
        offsets=tuple(range(0, -(options.before or 0) - 1, -1)),
        rank=options.rank,
        tokens=options.segment,
        window=options.window,
        most_tokens=options.tokens,
    )
    sharer, sharer_tokenizer = load_model(options.sharer)
    receiver, receiver_tokenizer = load_model(options.receiver)
    checkpoint = output.with_name(output.name + ".checkpoint")
    if checkpoint.exists():
        note(f"goes on from {checkpoint}")
    bars = _Bars()
    try:
        projector = fit_projector(
            sharer,
            receiver,
            [document.text for document in documents],
            sharer_tokenizer=sharer_tokenizer,
            receiver_tokenizer=receiver_tokenizer,
            options=settings,
            checkpoint=checkpoint,
            update=bars.update,
        )
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    finally:
        bars.close()
    try:
        projector.save(output, storage=options.storage)
    except OSError as error:
        raise outputs.unwritten("--output", output, error) from error
    if options.json:
        print(json.dumps({"output": str(output), "bytes": output.stat().st_size, **projector.facts}))
        return 0
    corpus, records = projector.facts["corpus"], projector.facts["layers"]
    halves = {name: sum(r[name]["unexplained"] for r in records) / len(records) for name in ("key", "value")}
    print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, fitted on {corpus['tokens']} tokens of {corpus['documents']} "
        f"documents in {projector.facts['seconds']:.0f} s; unexplained on held-out text: keys {halves['key']:.0%}, "
        f"values {halves['value']:.0%}"
    )
    return 0


def _complete(options: argparse.Namespace) -> None:
    """Fills in what a known pair says. CommandError where something is left open."""
    if options.pair is not None:
        output = known_pairs.cached(options.pair)
        if options.output is None:
            output.parent.mkdir(parents=True, exist_ok=True)
        known = {
            **known_pairs.PAIRS[options.pair]._asdict(),
            "corpus": [known_pairs.CORPUS],
            "tokens": known_pairs.TOKENS,
            "output": str(output),
        }
        for name, value in known.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
    missing = [f"--{name}" for name in ("sharer", "receiver", "corpus", "output") if getattr(options, name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} missing: all of them, or --pair, are wanted")


class _Bars:
    """One bar at a time, for the stage that is under way."""

    def __init__(self) -> None:
        self._name = ""
        self._open = ExitStack()
        self._move: Callable[[int], None] = lambda done: None

    def update(self, name: str, done: int, of: int) -> None:
        if name != self._name:
            self.close()
            self._name = name
            self._move = self._open.enter_context(stage(_LABELS[name], of))
        self._move(done)

    def close(self) -> None:
        self._open.close()
        self._name = ""
