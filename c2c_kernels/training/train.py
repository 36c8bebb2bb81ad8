"""Training a CacheProjector by gradients: both models frozen, the loss on what the receiver says next."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from c2c_kernels._version import __version__
from c2c_kernels.alignment import check_offsets
from c2c_kernels.checkpoints import Checkpoint
from c2c_kernels.fitting.texts import corpus_hash
from c2c_kernels.identity import check_identity, identify
from c2c_kernels.integrations.transformers import disable
from c2c_kernels.integrations.transformers.attention import PATCH
from c2c_kernels.projectors import CacheProjector
from c2c_kernels.training.batches import Batch, collate
from c2c_kernels.training.coordinates import Coordinates, InputMoments
from c2c_kernels.training.course import Course, rate, temperature
from c2c_kernels.training.examples import Stream
from c2c_kernels.training.material import Examples, check_lengths, held_out, streams
from c2c_kernels.training.options import TrainOptions
from c2c_kernels.training.processes import Processes
from c2c_kernels.training.trainee import Trainee
from c2c_kernels.training.validation import Validation

# Windows over which the moments of what maps read are measured.
_FOR_MOMENTS = 16
_CURVE_POINTS = 48
_DIGITS = 16  # of the SHA-256s that facts record, as a fit does


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: steps done.
        done: share 0..1 of the run.
        seconds: since it began, interruptions left out.
        loss: of the last step.
        held_out: see `Validation.look`; None where it was not looked at now.
    """

    step: int
    done: float
    seconds: float
    loss: float
    held_out: dict[str, dict[str, float]] | None = None


Update = Callable[[Progress], None]


@dataclass
class _Run:
    """What is kept of a run besides tensors."""

    step: int = 0
    seconds: float = 0.0
    processor: float = 0.0  # seconds of all threads of this process, which other work on the machine does not change
    done: float = 0.0
    taken: dict[str, int] = field(default_factory=dict)
    dealt: int = 0
    scored: int = 0
    losses: list[list[float]] = field(default_factory=list)  # per step: loss, cross-entropy, KL, match
    times: list[float] = field(default_factory=list)  # per step: seconds
    looked: list[dict[str, Any]] = field(default_factory=list)


def train_projector(
    sharer: Any,
    receiver: Any,
    projector: CacheProjector,
    examples: Examples,
    *,
    sharer_tokenizer: Any,
    receiver_tokenizer: Any,
    options: TrainOptions,
    backend: str | None = None,
    checkpoint: str | Path | None = None,
    update: Update = lambda progress: None,
) -> CacheProjector:
    """A fitted projector, trained on what follows.

    Under torch.distributed every process calls it with the same arguments; batches are dealt out, all end with the
    same parameters, and only the first writes checkpoints and calls `update`.

    Args:
        sharer, receiver: Transformers models, float32 or bfloat16; they are frozen. The receiver's attention runs
            `merged_attention` meanwhile.
        projector: what a fit made, see `CacheProjector.fit`; it stays as it is. Its maps are trained in float32.
        examples: see `Examples`.
        sharer_tokenizer, receiver_tokenizer: fast tokenizers.
        options: see `TrainOptions`.
        backend: of `project_kv` and `merged_attention`, None for the fastest that can run the call.
        checkpoint: file that an interrupted run goes on from (by steps to the same bits) and that is removed at the
            end; None: no checkpoints.
        update: is called after every step.

    Returns:
        a new projector with gates, whose `facts["training"]` say what it was trained on and how the loss went.

    Raises:
        ValueError: naming the argument, before anything is trained: options, a projector whose maps are zero or that
            was made for other models, empty or short texts, texts longer than a model's context, a checkpoint of
            another run.
        TypeError: for tokenizers without offsets.
    """
    processes = Processes.here()
    for name, tokenizer in (("sharer_tokenizer", sharer_tokenizer), ("receiver_tokenizer", receiver_tokenizer)):
        check_offsets(tokenizer, name)
    options.check(projector)
    _check_projector(projector, sharer, receiver, sharer_tokenizer, receiver_tokenizer)
    check_lengths(options, examples, projector.prefix, sharer, receiver, sharer_tokenizer, receiver_tokenizer)
    trained, kept = held_out(examples, options)
    tokenizers = (sharer_tokenizer, receiver_tokenizer)
    dealt = streams(trained, projector.prefix, tokenizers, options)
    projector = copy.deepcopy(projector).requires_grad_(True)
    if projector.gate_logits is None:
        projector.add_gates(int(receiver.config.num_attention_heads))
    was_enabled = PATCH in receiver.base_model.__dict__
    trainee = Trainee(
        projector, sharer, receiver, distill=options.distill, match=options.match, backend=backend
    ).train()
    try:
        validation = _validation(kept, projector, tokenizers, options) if processes.rank == 0 else Validation({})
        made_for = _made_for(projector, examples, options, processes, backend, receiver)
        processes.same("models, options and texts", made_for)
        keeper = None
        if checkpoint is not None:
            keeper = Checkpoint(Path(checkpoint), "training", made_for, options.checkpoint_seconds)
        run = _train(trainee, dealt, validation, options, processes, keeper, update)
    finally:
        if not was_enabled:
            disable(receiver.base_model)
    projector.facts = {**projector.facts, "training": _facts(run, examples, options, processes, projector)}
    if checkpoint is not None and processes.rank == 0:
        Path(checkpoint).unlink(missing_ok=True)
    return projector.eval()


def _train(
    trainee: Trainee,
    streams: Sequence[Stream],
    validation: Validation,
    options: TrainOptions,
    processes: Processes,
    keeper: Checkpoint | None,
    update: Update,
) -> _Run:
    projector, course, run = trainee.projector, Course(streams, options), _Run()
    heats = options.temperatures(projector)
    begun = _begun(projector, heats[1]) if options.average else []
    restored = None if keeper is None else keeper.restore()
    coordinates = Coordinates(projector, _moments(trainee, streams) if restored is None else None)
    optimizer = _optimizer(projector, coordinates, options)
    if restored is not None:
        run = _Run(**restored[0])
        course.taken, course.dealt = dict(run.taken), run.dealt
        _load_state(projector, coordinates, optimizer, restored[1])
    module: nn.Module = trainee
    if processes.count > 1:
        module = DistributedDataParallel(trainee)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    looks = max(options.validations, 1)
    before, began = run.seconds, time.perf_counter()
    processor = run.processor - time.process_time()
    while True:
        run.seconds = before + time.perf_counter() - began
        run.processor = processor + time.process_time()
        run.done = processes.from_first(_done(run, options))
        projector.gate_temperature = temperature(run.done, heats)
        if run.done >= 1:
            _average(projector, begun, options.average)
        look = None
        if validation and options.validations and len(run.looked) <= run.done * looks:
            look = validation.look(trainee)
            run.looked.append({"step": run.step, "seconds": run.seconds, **look})
        if run.step or look:
            loss = run.losses[-1][0] if run.losses else float("nan")
            if processes.rank == 0:
                update(Progress(run.step, run.done, run.seconds, loss, look))
        if run.done >= 1:
            return run
        if keeper is not None and processes.rank == 0 and run.step and keeper.due():
            keeper.keep(lambda: asdict(run), lambda: _state(projector, coordinates, optimizer))
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * rate(_middle(run, options), options.warmup)
        terms, scored = _step(module, course, projector, options, processes)
        coordinates.pull()
        torch.nn.utils.clip_grad_norm_(parameters, options.clip, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        coordinates.push()
        run.step += 1
        run.taken, run.dealt = dict(course.taken), course.dealt
        run.scored += scored
        run.losses.append([round(value, 6) for value in terms.tolist()])
        run.times.append(round(before + time.perf_counter() - began, 3))


@torch.no_grad()
def _begun(projector: CacheProjector, last: float) -> list[Tensor]:
    """What every parameter is before; logits of gates at the temperature that they will have, with the same gates."""
    heat = last / projector.gate_temperature
    return [p.clone() * (heat if p is projector.gate_logits else 1.0) for p in projector.parameters()]


@torch.no_grad()
def _average(projector: CacheProjector, begun: Sequence[Tensor], share: float) -> None:
    """Moves every parameter towards what it was before; without `begun` none."""
    if begun:
        for parameter, before in zip(projector.parameters(), begun, strict=True):
            parameter.lerp_(before, share)


def _done(run: _Run, options: TrainOptions) -> float:
    if options.steps is not None:
        return run.step / options.steps
    assert options.minutes is not None
    return min(run.seconds / (60 * options.minutes), 1.0)


def _middle(run: _Run, options: TrainOptions) -> float:
    """Share of the run in the middle of the next step, as far as it is known: no step has a rate of 0."""
    if options.steps is not None:
        return (run.step + 0.5) / options.steps
    return run.done + (0.5 * run.done / run.step if run.step else 1e-3)


def _step(
    module: nn.Module, course: Course, projector: CacheProjector, options: TrainOptions, processes: Processes
) -> tuple[Tensor, int]:
    """Gradients of one step; means over its batches of (loss, cross-entropy, KL, match), and tokens scored."""
    terms, scored = torch.zeros(4, dtype=torch.float64), 0
    for number in range(options.accumulate):
        windows = [course.deal(rank == processes.rank) for rank in range(processes.count)][processes.rank]
        batch = collate(windows, projector)
        last = number == options.accumulate - 1
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                loss, parts = module(batch)
                (loss / options.accumulate).backward()
        else:
            loss, parts = module(batch)
            (loss / options.accumulate).backward()
        terms += torch.cat([loss.detach()[None], parts]).double() / options.accumulate
        scored += batch.scored
    return processes.mean(terms), scored


def _moments(trainee: Trainee, streams: Sequence[Stream]) -> InputMoments:
    moments = InputMoments(trainee.projector)
    for number in range(_FOR_MOMENTS):
        batch = collate([streams[number % len(streams)].window(number)], trainee.projector)
        moments.add(trainee.read(batch), batch.plan)
    return moments


def _optimizer(projector: CacheProjector, coordinates: Coordinates, options: TrainOptions) -> torch.optim.Optimizer:
    weights = [parameter for parameter in coordinates.maps.values() if parameter.dim() > 1]
    biases = [parameter for parameter in coordinates.maps.values() if parameter.dim() == 1]
    assert projector.gate_logits is not None
    groups = [
        {"params": weights, "most": options.lr, "weight_decay": options.weight_decay},
        {"params": biases, "most": options.bias_lr, "weight_decay": 0.0},
        {"params": [projector.gate_logits], "most": options.gate_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.99), fused=True)


def _trained(projector: CacheProjector, coordinates: Coordinates) -> dict[str, nn.Parameter]:
    assert projector.gate_logits is not None
    return {**coordinates.maps, "gate_logits": projector.gate_logits}


def _state(projector: CacheProjector, coordinates: Coordinates, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that the next step depends on: parameters, their coordinates, and the optimiser's state."""
    assert projector.gate_logits is not None
    tensors = {**coordinates.state(), "gate_logits": projector.gate_logits.detach()}
    for name, parameter in _trained(projector, coordinates).items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    return tensors


@torch.no_grad()
def _load_state(
    projector: CacheProjector, coordinates: Coordinates, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    assert projector.gate_logits is not None
    coordinates.load_state(state)
    projector.gate_logits.copy_(state["gate_logits"])
    trained = _trained(projector, coordinates)
    for place, tensor in state.items():
        if place.startswith("optimizer."):
            _, key, name = place.split(".", 2)
            optimizer.state[trained[name]][key] = tensor.clone()


def _check_projector(
    projector: CacheProjector, sharer: Any, receiver: Any, sharer_tokenizer: Any, receiver_tokenizer: Any
) -> None:
    if not any(bool(parameter.any()) for name, parameter in projector.named_parameters() if "proj" in name):
        raise ValueError("the projector's maps are zero: training starts from a fit, see CacheProjector.fit")
    for role, model, tokenizer in (("sharer", sharer, sharer_tokenizer), ("receiver", receiver, receiver_tokenizer)):
        check_identity(role, getattr(projector, f"{role}_identity"), identify(model, tokenizer))


def _validation(
    kept: Examples, projector: CacheProjector, tokenizers: tuple[Any, Any], options: TrainOptions
) -> Validation:
    batches: dict[str, list[Batch]] = {}
    settings = replace(options, seed=0)
    for part in (replace(kept, questions=()), replace(kept, texts=())):
        try:
            found = streams(part, projector.prefix, tokenizers, settings)
        except ValueError:  # the documents held out are all too short
            continue
        for stream in found:
            windows = [stream.window(number) for number in range(options.held_out)]
            batches[stream.kind] = [collate([window], projector) for window in windows]
    return Validation(batches)


def _made_for(
    projector: CacheProjector,
    examples: Examples,
    options: TrainOptions,
    processes: Processes,
    backend: str | None,
    receiver: Any,
) -> dict[str, Any]:
    """What a checkpoint is only good for."""
    questions = [f"{one.context}\0{one.head}{one.rest}{one.answer}" for one in examples.questions]
    weights = [f"{name} {tensor.double().sum()} {tensor.double().square().sum()}" for name, tensor in
               projector.state_dict().items()]  # fmt: skip
    return {
        "options": asdict(replace(options, checkpoint_seconds=0.0)),
        "projector": corpus_hash(weights),
        "texts": corpus_hash(examples.texts),
        "questions": corpus_hash(questions),
        "sharer": asdict(projector.sharer_identity),
        "receiver": asdict(projector.receiver_identity),
        "dtype": str(receiver.dtype),
        "backend": backend,
        "processes": processes.count,
    }


def _facts(
    run: _Run, examples: Examples, options: TrainOptions, processes: Processes, projector: CacheProjector
) -> dict[str, Any]:
    """What the file says of the run, and of an earlier one that it went on from."""
    earlier = dict(projector.facts.get("training", {}))
    texts = [*earlier.pop("texts", ()), *(digest[:_DIGITS] for digest in examples.hashes)]
    size = -(-len(run.losses) // _CURVE_POINTS)
    curve = []
    for at in range(0, len(run.losses), size or 1):
        part = torch.tensor(run.losses[at : at + size], dtype=torch.float64).mean(dim=0)
        names = ("loss", "cross_entropy", "kl", "match")
        means = {name: round(value, 4) for name, value in zip(names, part.tolist(), strict=True) if value == value}
        last = min(at + size, len(run.losses))
        curve.append({"step": last, "seconds": round(run.times[last - 1], 1), **means})
    return {
        "version": __version__,
        "options": asdict(options),
        "processes": processes.count,
        "steps": run.step,
        "seconds": run.seconds,
        "processor_seconds": run.processor,  # of the first process
        "windows": run.taken,
        "tokens_scored": run.scored,
        "curve": curve,
        "held_out": run.looked,
        "texts": list(dict.fromkeys(texts)),
        **({"before": earlier} if earlier else {}),
    }
