"""Training a C2CFuser by gradients: both models have read a text, the receiver's cache is fused, the loss is on what
the receiver says next. Both models are frozen; gates are soft and become hard (arXiv 2510.03215)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from c2c_kernels._version import __version__
from c2c_kernels.alignment import Strategy, align, check_offsets
from c2c_kernels.checkpoints import Checkpoint
from c2c_kernels.fitting.texts import corpus_hash
from c2c_kernels.fuser_weights import Pair
from c2c_kernels.fusers import Annealing, C2CFuser
from c2c_kernels.identity import check_identity, identify
from c2c_kernels.integrations.transformers import read_tokens
from c2c_kernels.integrations.transformers.caches import read_cache
from c2c_kernels.training.course import Course, rate, temperature
from c2c_kernels.training.examples import Row, Window
from c2c_kernels.training.head import Head, head_loss
from c2c_kernels.training.material import Examples, check_lengths, held_out, streams
from c2c_kernels.training.options import TrainOptions
from c2c_kernels.training.train import Progress, Update


@dataclass
class _Run:
    """What is kept of a run besides tensors."""

    step: int = 0
    seconds: float = 0.0
    taken: dict[str, int] = field(default_factory=dict)
    dealt: int = 0
    scored: int = 0
    losses: list[float] = field(default_factory=list)
    looked: list[dict[str, Any]] = field(default_factory=list)


def train_fuser(
    sharer: Any,
    receiver: Any,
    fuser: C2CFuser,
    examples: Examples,
    *,
    sharer_tokenizer: Any,
    receiver_tokenizer: Any,
    options: TrainOptions,
    alignment: Strategy = "last",
    backend: str | None = None,
    checkpoint: str | Path | None = None,
    update: Update = lambda progress: None,
) -> C2CFuser:
    """A fuser trained on what follows texts that both models have read, and on questions about them.

    Args:
        sharer, receiver: Transformers models, float32 or bfloat16; they are frozen.
        fuser: where to start: `C2CFuser.for_models`, or a trained one. It stays as it is.
        examples: see `Examples`.
        sharer_tokenizer, receiver_tokenizer: fast tokenizers.
        options: see `TrainOptions`; distill and match must be 0. gate_temperature is annealed over the run.
        alignment: which sharer token a receiver token is fused with, see `Alignment.index`.
        backend: of `fuse_kv`, in the forward pass without dropout.
        checkpoint: file that an interrupted run goes on from (by steps to the same bits) and that is removed at the
            end; None: no checkpoints.
        update: is called after every step.

    Returns:
        a new fuser in float32 and evaluation mode, its `facts["training"]` say what it was trained on and how the
        loss went.

    Raises:
        ValueError: naming the argument, before anything is trained.
        TypeError: for tokenizers without offsets.
    """
    for name, tokenizer in (("sharer_tokenizer", sharer_tokenizer), ("receiver_tokenizer", receiver_tokenizer)):
        check_offsets(tokenizer, name)
    options.check()
    for name in ("distill", "match"):
        if getattr(options, name):
            raise ValueError(f"{name} must be 0 for a fuser: its receiver reads the text itself")
    fuser.check_models(receiver, sharer)
    identities = identify(sharer, sharer_tokenizer), identify(receiver, receiver_tokenizer)
    for role, wanted, came in zip(("sharer", "receiver"), (fuser.sharer, fuser.receiver), identities, strict=True):
        check_identity(role, wanted, came)
    tokenizers = (sharer_tokenizer, receiver_tokenizer)
    check_lengths(options, examples, (), sharer, receiver, *tokenizers)
    trained, kept = held_out(examples, options)
    made_for = {
        "options": asdict(replace(options, checkpoint_seconds=0.0)),
        "fuser": corpus_hash([f"{name} {t.double().sum()} {t.double().square().sum()}" for name, t in
                              fuser.state_dict().items()]),
        "material": corpus_hash(examples.hashes),
        "models": [identity.model for identity in identities],
        "alignment": alignment,
        "backend": backend,
    }  # fmt: skip
    fuser = copy.deepcopy(fuser).float().requires_grad_(True).train()
    fuser.sharer, fuser.receiver = (
        replace(found, name=found.name or given.name)
        for found, given in zip(identities, (fuser.sharer, fuser.receiver), strict=True)
    )
    fuser.annealing = Annealing(*options.gate_temperature, options.steps or fuser.annealing.steps)
    for model in (sharer, receiver):
        model.eval().requires_grad_(False)
    reader = _Reader(sharer, receiver, alignment, backend)
    looked_at = [
        stream.window(number)
        for part in (replace(kept, questions=()), replace(kept, texts=()))
        for stream in _long_enough(part, tokenizers, options)
        for number in range(options.held_out)
    ]
    keeper = None
    if checkpoint is not None:
        keeper = Checkpoint(Path(checkpoint), "fuser-training", made_for, options.checkpoint_seconds)
    course = Course(streams(trained, (), tokenizers, options), options)
    run = _train(fuser, reader, course, looked_at, options, keeper, update)
    fuser.facts = {**fuser.facts, "training": _facts(run, examples, options)}
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return fuser.eval()


def _long_enough(part: Examples, tokenizers: tuple[Any, Any], options: TrainOptions) -> list[Any]:
    """The streams of what is held out; none where its documents are all too short."""
    try:
        return list(streams(part, (), tokenizers, replace(options, seed=0)))
    except ValueError:
        return []


class _Reader:
    """Both frozen models, and what they make of a window."""

    def __init__(self, sharer: Any, receiver: Any, alignment: Strategy, backend: str | None) -> None:
        self.sharer, self.receiver, self.alignment, self.backend = sharer, receiver, alignment, backend
        self.head = Head(receiver)

    @torch.no_grad()
    def read(self, window: Window) -> tuple[list[Pair], list[Pair], Tensor]:
        """The receiver's cache of head and text as far as rows see it, the sharer's, and (1, text tokens) the index."""
        stop = max(row.start for row in window.rows)
        own = read_cache(read_tokens(self.receiver, [*window.head, *window.receiver.ids[:stop]]), "receiver")
        raw = read_cache(read_tokens(self.sharer, window.sharer.ids), "sharer")
        index = align(window.sharer, window.receiver).index(self.alignment)[None, :stop]
        return own, raw, index.to(own[0][0].device)

    def fused(self, fuser: C2CFuser, window: Window) -> list[Pair]:
        """The receiver's cache of head and text, the text's tokens fused."""
        own, raw, index = self.read(window)
        first = len(window.head)
        text = [(key[:, :, first:], value[:, :, first:]) for key, value in own]
        made = fuser(text, raw, index=index, backend=self.backend)
        return [
            (torch.cat([pair[0][:, :, :first], new[0]], dim=2), torch.cat([pair[1][:, :, :first], new[1]], dim=2))
            for pair, new in zip(own, made, strict=True)
        ]

    def loss(self, layers: Sequence[Pair], before: int, row: Row) -> tuple[Tensor, int]:
        """Sum of -ln p over the scored tokens of a row that sees the first `before` tokens, and how many they are."""
        cache = DynamicCache()
        for number, (key, value) in enumerate(layers):
            cache.update(key[:, :, :before], value[:, :, :before], number)
        ids = torch.tensor([row.ids], device=self.receiver.device)
        hidden = self.receiver.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        scored = hidden.last_hidden_state[0, row.first - 1 :]
        targets = ids[0, row.first :]
        mean, _ = head_loss(self.head, scored, targets, None, 0.0)
        return mean * len(targets), len(targets)

    @torch.no_grad()
    def look(self, fuser: C2CFuser, windows: Sequence[Window]) -> dict[str, float]:
        """-ln p per token of what is held out, with the hard gates and without fusing."""
        sums, count = {"fused": 0.0, "alone": 0.0}, 0
        fuser.eval()
        for window in windows:
            arms = {"fused": self.fused(fuser, window), "alone": self.read(window)[0]}
            for row in window.rows:
                for arm, layers in arms.items():
                    loss, scored = self.loss(layers, len(window.head) + row.start, row)
                    sums[arm] += float(loss)
                count += scored
        fuser.train()
        return {arm: total / count for arm, total in sums.items()}


def _train(
    fuser: C2CFuser, reader: _Reader, course: Course, looked_at: Sequence[Window], options: TrainOptions,
    keeper: Checkpoint | None, update: Callable[[Progress], None],
) -> _Run:  # fmt: skip
    run, optimizer = _Run(), _optimizer(fuser, options)
    restored = None if keeper is None else keeper.restore()
    if restored is not None:
        run = _Run(**restored[0])
        course.taken, course.dealt = dict(run.taken), run.dealt
        _load_state(fuser, optimizer, restored[1])
    looks = max(options.validations, 1)
    before, began = run.seconds, time.perf_counter()
    while True:
        run.seconds = before + time.perf_counter() - began
        done = run.step / options.steps if options.steps else min(run.seconds / (60 * (options.minutes or 1)), 1.0)
        fuser.gate_temperature = temperature(done, options.gate_temperature)
        look = None
        if looked_at and options.validations and len(run.looked) <= done * looks:
            look = reader.look(fuser, looked_at)
            run.looked.append({"step": run.step, "seconds": run.seconds, **look})
        if run.step or look:
            held = None if look is None else {"held-out": look}
            update(Progress(run.step, done, run.seconds, run.losses[-1] if run.losses else float("nan"), held))
        if done >= 1:
            return run
        if keeper is not None and run.step and keeper.due():
            keeper.keep(lambda: asdict(run), lambda: _state(fuser, optimizer))
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * rate(done + (0.5 / options.steps if options.steps else 1e-3), options.warmup)
        with _drawn_for(options.seed, run.step):
            loss, scored = _gradients(fuser, reader, course, options)
        torch.nn.utils.clip_grad_norm_(fuser.parameters(), options.clip, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.taken, run.dealt = dict(course.taken), course.dealt
        run.scored += scored
        run.losses.append(round(loss, 6))


@contextmanager
def _drawn_for(seed: int, step: int) -> Iterator[None]:
    """Gates and dropout of a step are drawn from its number: a run that goes on draws what it would have drawn."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed((seed << 32) + step)
        yield


def _gradients(fuser: C2CFuser, reader: _Reader, course: Course, options: TrainOptions) -> tuple[float, int]:
    """Gradients of one step: means over the batches of a step; the loss per token, and tokens scored.

    A row's graph through the receiver is gone before the next one's begins; the fuser's is walked once a window.
    """
    total, scored = 0.0, 0
    for _ in range(options.accumulate):
        windows = course.deal()
        count = sum(len(row.ids) - row.first for window in windows for row in window.rows)
        for window in windows:
            fused = reader.fused(fuser, window)
            leaves = [(key.detach().requires_grad_(), value.detach().requires_grad_()) for key, value in fused]
            for row in window.rows:
                loss, tokens = reader.loss(leaves, len(window.head) + row.start, row)
                (loss / (count * options.accumulate)).backward()
                total += float(loss.detach()) / (count * options.accumulate)
                scored += tokens
            pairs = [
                (made, leaf.grad)
                for new, old in zip(fused, leaves, strict=True)
                for made, leaf in zip(new, old, strict=True)
                if made.requires_grad and leaf.grad is not None
            ]
            torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])
    return total, scored


def _optimizer(fuser: C2CFuser, options: TrainOptions) -> torch.optim.Optimizer:
    gates = [logit for layer in fuser.layer_map for logit in fuser[layer].gate_logits]
    named = {id(gate) for gate in gates}
    weights = [parameter for parameter in fuser.parameters() if id(parameter) not in named]
    groups = [
        {"params": weights, "most": options.lr, "weight_decay": options.weight_decay},
        {"params": gates, "most": options.gate_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, fused=True)


def _state(fuser: C2CFuser, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"fuser.{name}": parameter.detach() for name, parameter in fuser.named_parameters()}
    for name, parameter in fuser.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    return tensors


@torch.no_grad()
def _load_state(fuser: C2CFuser, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    named = dict(fuser.named_parameters())
    for place, tensor in state.items():
        kind, rest = place.split(".", 1)
        if kind == "fuser":
            named[rest].copy_(tensor)
        else:
            key, name = rest.split(".", 1)
            optimizer.state[named[name]][key] = tensor.clone()


def _facts(run: _Run, examples: Examples, options: TrainOptions) -> dict[str, Any]:
    return {
        "version": __version__,
        "options": asdict(options),
        "steps": run.step,
        "seconds": run.seconds,
        "windows": run.taken,
        "tokens_scored": run.scored,
        "losses": run.losses,
        "held_out": run.looked,
        "texts": [digest[:16] for digest in examples.hashes],
    }
