"""`c2c-kernels train --fuser c2c`: the paper's fuser, on texts that both models read."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_kernels import corpus
from c2c_kernels.cli import outputs
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import note, watch

if TYPE_CHECKING:
    from c2c_kernels.fusers import C2CFuser
    from c2c_kernels.training import Progress, TrainOptions

LR, _WEIGHT_DECAY = 1e-4, 0.01
_TEMPERATURE = (1.0, 0.001)
# Of a new fuser; name of the option, what it is called by `C2CFuser.for_models`, and its default.
_SIZES: tuple[tuple[str, type, Any, str], ...] = (
    ("hidden", int, 1024, "width of the network"),
    ("inner", int, 1024, "width inside its blocks"),
    ("num_layers", int, 3, "blocks before the projection are two fewer"),
    ("dropout", float, 0.1, "of what a block adds, in training"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says how a fuser is made."""
    group = parser.add_argument_group("the paper's fuser")
    group.add_argument("--fuser", choices=("c2c",), help="train this instead of a projector")
    group.add_argument(
        "--layer-map", metavar="MAP", help="last_aligned, k_nearest, or sharer layers by receiver layer: 0,0,1 "
        "(last_aligned)",
    )  # fmt: skip
    for name, kind, default, text in _SIZES:
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{text} ({default:g})")
    group.add_argument(
        "--alignment", choices=("first", "longest", "last"), help="which sharer token a receiver token reads (last)"
    )


def refuse(options: argparse.Namespace) -> None:
    """CommandError for options of a fuser without one."""
    for name in ("layer_map", "alignment", *(size[0] for size in _SIZES)):
        if getattr(options, name) is not None:
            raise CommandError(f"--{name.replace('_', '-')} goes with --fuser")


def check(options: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CommandError("--fuser trains in one process")
    if options.storage == "int8":
        raise CommandError("--storage int8 is for projectors: float32 or bfloat16 is wanted")
    if options.distill or options.match or options.repeat_weight:
        raise CommandError(
            "--distill, --match and --repeat-weight are for projectors: a fuser's receiver reads the text itself"
        )
    if options.average:
        raise CommandError("--average is for projectors, which training always starts from")
    if options.projector is not None:
        for name in ("layer_map", *(size[0] for size in _SIZES)):
            if getattr(options, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} is that of {options.projector}: leave it out")


def run(
    options: argparse.Namespace,
    documents: Sequence[corpus.Document],
    questions: Sequence[corpus.Question],
    output: Path,
) -> int:
    """Trains and writes the file; returns the exit status."""
    settings = _settings(options)
    try:
        settings.check()
    except ValueError as error:
        raise CommandError(str(error)) from error
    fuser = _train(options, settings, documents, questions, output)
    try:
        import torch

        fuser.save(output, storage=getattr(torch, options.storage or "float32"))
    except OSError as error:
        raise outputs.unwritten("--output", output, error) from error
    _report(options, fuser, output)
    return 0


def _settings(options: argparse.Namespace) -> TrainOptions:
    from c2c_kernels.training import TrainOptions

    names = (
        "steps", "minutes", "batch", "question_batch", "accumulate", "question_weight", "gate_lr", "context",
        "continuation", "held_out", "validations", "seed", "checkpoint_seconds",
    )  # fmt: skip
    return TrainOptions(
        **{name: getattr(options, name) for name in names}, lr=LR if options.lr is None else options.lr, distill=0.0,
        weight_decay=_WEIGHT_DECAY, gate_temperature=_TEMPERATURE,
        least_context=min(TrainOptions.least_context, options.context),
    )  # fmt: skip


def _train(
    options: argparse.Namespace,
    settings: TrainOptions,
    documents: Sequence[corpus.Document],
    questions: Sequence[corpus.Question],
    output: Path,
) -> C2CFuser:
    import torch

    from c2c_kernels.cli.models import load_model
    from c2c_kernels.cli.train import asked_of
    from c2c_kernels.training import Examples
    from c2c_kernels.training.fuser import train_fuser

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    (sharer, sharer_tokenizer), (receiver, receiver_tokenizer) = (
        load_model(spec, getattr(torch, options.dtype)) for spec in (options.sharer, options.receiver)
    )
    checkpoint = output.with_name(output.name + ".checkpoint")
    if checkpoint.exists():
        note(f"goes on from {checkpoint}")
    total = options.steps if options.minutes is None else 1000
    asked = [asked_of(receiver_tokenizer, question) for question in questions]
    with watch("train", total) as show:
        try:
            return train_fuser(
                sharer,
                receiver,
                _start(options, receiver, sharer),
                Examples([document.text for document in documents], asked),
                sharer_tokenizer=sharer_tokenizer,
                receiver_tokenizer=receiver_tokenizer,
                options=settings,
                alignment=options.alignment or "last",
                backend=options.backend,
                checkpoint=checkpoint,
                update=lambda progress: show(round(progress.done * total), *_lines(progress)),
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise CommandError(str(error)) from error


def _start(options: argparse.Namespace, receiver: Any, sharer: Any) -> C2CFuser:
    """The fuser to begin with: that of the file, or a new one drawn from the seed."""
    import torch

    from c2c_kernels.fusers import C2CFuser

    if options.projector is not None:
        return C2CFuser.load(options.projector)
    sizes = {
        name: default if getattr(options, name) is None else getattr(options, name) for name, _, default, _ in _SIZES
    }
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        fuser = C2CFuser.for_models(receiver, sharer, _layer_map(options.layer_map or "last_aligned"), **sizes)
    fuser.sharer = replace(fuser.sharer, name=options.sharer)
    fuser.receiver = replace(fuser.receiver, name=options.receiver)
    return fuser


def _layer_map(text: str) -> str | list[int]:
    parts = text.split(",")
    return [int(part) for part in parts] if all(part.strip().isdigit() for part in parts) else text


def _lines(progress: Progress) -> tuple[str, str]:
    """What stands beside the bar, and what is worth a line of its own."""
    short = f"loss {progress.loss:.3f}" if progress.step else ""
    if progress.held_out is None:
        return short, ""
    found = progress.held_out["held-out"]
    return short, (
        f"step {progress.step}, {progress.seconds:.0f} s: held-out text {found['fused']:.3f} nats a token "
        f"(without fusing {found['alone']:.3f})"
    )


def _report(options: argparse.Namespace, fuser: C2CFuser, output: Path) -> None:
    facts = fuser.facts["training"]
    report = fuser.gate_report()
    still = sum(gates.key + gates.value for gates in report)
    if options.json:
        print(json.dumps({"output": str(output), "bytes": output.stat().st_size, "open_gates": still, **facts}))
        return
    losses = facts["losses"]
    print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, {facts['steps']} steps in {facts['seconds']:.0f} s over "
        f"{facts['tokens_scored']} tokens; loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; "
        f"{still} of {2 * len(report)} gates open"
    )
