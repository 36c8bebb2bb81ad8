"""Fitting a CacheProjector: both models read, moments are summed, sources and ridge are chosen, maps are solved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c2c_kernels._version import __version__
from c2c_kernels.alignment import Strategy, check_offsets
from c2c_kernels.checkpoints import Checkpoint
from c2c_kernels.fitting.moments import Moments
from c2c_kernels.fitting.reading import Pair
from c2c_kernels.fitting.ridge import Affine, GroupChoice, HeldOut, affine, choose_ridge
from c2c_kernels.fitting.stretch import choose_stretch, stretched
from c2c_kernels.fitting.texts import Corpus, Window, corpus_hash, cut, text_hashes
from c2c_kernels.identity import identify
from c2c_kernels.integrations.transformers.projected import cache_shape
from c2c_kernels.projectors import CacheProjector, CacheShape, Source, Tokens, wide_columns

Update = Callable[[str, int, int], None]  # stage, done, of


@dataclass(frozen=True)
class FitOptions:
    """How a projector is fitted.

    Attributes:
        layers_read: sharer layers that every receiver layer reads (keys and values of each), chosen on held-out text.
        offsets: tokens that are read besides the aligned one (0): -1 is the one before.
        candidates: sharer layers to choose from; None: all.
        ridges: candidates for the ridge, relative to unit variance of the features; chosen on held-out text.
        stretches: candidates for the factor by which keys are stretched away from their mean, see `fitting.stretch`;
            chosen on held-out text.
        rank: of the maps, None for full matrices.
        tokens, strategy: see `CacheProjector`.
        window: receiver tokens of a piece of text that both models read at once.
        most_tokens: receiver tokens to fit, to the end of the window that reaches them; None for the whole corpus.
        held_out: one document in so many is kept from the fit.
        held_out_tokens: how many tokens of those are read.
        chunk: windows between two additions to the moments.
        checkpoint_seconds: between two checkpoints.
    """

    layers_read: int = 3
    offsets: tuple[int, ...] = (0,)
    candidates: tuple[int, ...] | None = None
    ridges: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    stretches: tuple[float, ...] = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3)
    rank: int | None = None
    tokens: Tokens = "receiver"
    strategy: Strategy = "last"
    window: int = 480
    most_tokens: int | None = None
    held_out: int = 12
    held_out_tokens: int = 2000
    chunk: int = 4
    checkpoint_seconds: float = 120.0

    def check(self, sharer: CacheShape, receiver: CacheShape) -> None:
        """ValueError naming the option that cannot be."""
        layers = self.candidates or tuple(range(sharer.layers))
        if any(not 0 <= layer < sharer.layers for layer in layers) or len(set(layers)) != len(layers):
            raise ValueError(f"candidates must be different layers of 0..{sharer.layers - 1}, got {self.candidates}")
        if not 1 <= self.layers_read <= len(layers):
            raise ValueError(f"layers_read must be in 1..{len(layers)}, got {self.layers_read}")
        if 0 not in self.offsets or max(self.offsets) > 0 or len(set(self.offsets)) != len(self.offsets):
            raise ValueError(f"offsets must hold 0 and otherwise different negative numbers, got {self.offsets}")
        if not self.ridges or min(self.ridges) <= 0:
            raise ValueError(f"ridges must be positive numbers, got {self.ridges}")
        if not self.stretches or not 0 < min(self.stretches) <= max(self.stretches) < float("inf"):
            raise ValueError(f"stretches must be positive numbers, got {self.stretches}")
        for name in ("window", "held_out", "held_out_tokens", "chunk"):
            if getattr(self, name) < (16 if name == "window" else 2 if name == "held_out" else 1):
                raise ValueError(f"{name} is {getattr(self, name)}: that is too small")
        full = receiver.kv_heads * min(receiver.head_dim, receiver.value_dim)
        if self.rank is not None and not 1 <= self.rank < full:
            raise ValueError(f"rank must be in 1..{full - 1}, or None for full matrices; got {self.rank}")


@dataclass(frozen=True, eq=False)
class _Layer:
    """What was found for one receiver layer."""

    sources: list[Source]
    columns: Tensor
    halves: tuple[Affine, Affine]
    record: dict[str, Any]


def fit_projector(
    sharer: Any,
    receiver: Any,
    texts: Sequence[str],
    *,
    sharer_tokenizer: Any,
    receiver_tokenizer: Any,
    options: FitOptions = FitOptions(),
    prefix: Sequence[int] | None = None,
    checkpoint: str | Path | None = None,
    update: Update = lambda stage, done, of: None,
) -> CacheProjector:
    """A projector from the sharer's cache to the receiver's, in closed form.

    Args:
        sharer, receiver: Transformers models with rotary embeddings, in evaluation mode.
        texts: documents. They are cut into windows; none is read whole.
        sharer_tokenizer, receiver_tokenizer: fast tokenizers.
        options: see `FitOptions`.
        prefix: ids that the receiver reads before every text; None: its start token where it has one.
        checkpoint: file that an interrupted fit goes on from and that is removed at the end; None: no checkpoints.
        update: is called with the stage's name, how much is done and of how much.

    Returns:
        a projector whose `facts` say what it was fitted on: hashes, tokens, what was chosen and what stayed
        unexplained on held-out text.

    Raises:
        ValueError: naming the argument, before any text is read by a model: options, empty or tiny corpora, windows
            longer than a model's context, a checkpoint of another fit.
        TypeError: for tokenizers without offsets.
    """
    began = time.perf_counter()
    for name, tokenizer in (("sharer_tokenizer", sharer_tokenizer), ("receiver_tokenizer", receiver_tokenizer)):
        check_offsets(tokenizer, name)
    sharer_shape, receiver_shape = cache_shape(sharer), cache_shape(receiver)
    options.check(sharer_shape, receiver_shape)
    groups = _groups(options, sharer_shape)
    sources = [source for group in groups for source in group]
    if prefix is None:
        start = receiver.config.bos_token_id
        prefix = () if start is None else (int(start),)
    _check_window(options, sharer, receiver, len(prefix))
    corpus = cut(
        texts,
        receiver_tokenizer,
        size=options.window,
        held_out=options.held_out,
        held_out_tokens=options.held_out_tokens,
        most=options.most_tokens,
    )
    smallest = options.layers_read * len(options.offsets) * sum(sharer_shape.width(source) for source in groups[0])
    if corpus.tokens < smallest:
        raise ValueError(
            f"texts have {corpus.tokens} tokens to fit, too few for maps that read {smallest} numbers a token: "
            f"at least {smallest} tokens are wanted"
        )
    frame = CacheProjector(
        sharer_shape,
        receiver_shape,
        [([sources[0]], [sources[0]])] * receiver_shape.layers,
        tokens=options.tokens,
        strategy=options.strategy,
        prefix=prefix,
        sharer_identity=identify(sharer, sharer_tokenizer, _name(sharer)),
        receiver_identity=identify(receiver, receiver_tokenizer, _name(receiver)),
    )
    pair = Pair(sharer, receiver, sharer_tokenizer, receiver_tokenizer, sharer_shape, receiver_shape, frame)
    moments, held_out, seconds = _sum(pair, corpus, sources, options, checkpoint, update)
    layers = _solve(moments, held_out, groups, receiver_shape, options, update)
    tokens, flops, held_out_tokens, means = moments.tokens, moments.flops, len(held_out.x), moments.means()[1]
    del moments, held_out  # 0.9 GB, before the receiver makes logits
    layers, stretch = _stretch(pair, corpus, frame, layers, means, options, update)
    facts = {
        "version": __version__,
        "options": asdict(options),
        "corpus": {
            "sha256": corpus.sha256,
            "documents": corpus.documents,
            # so that an evaluation can tell what was fitted on from what was not
            "texts": [digest[:16] for digest in text_hashes(texts)],
            "tokens": tokens,
            "held_out_tokens": held_out_tokens,
        },
        "layers": [layer.record for layer in layers],
        "stretch": stretch,
        "normal_equations": {"flops": flops, "seconds": seconds},
        "seconds": time.perf_counter() - began,
    }
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return _assemble(frame, layers, options.rank, facts)


def _name(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__).rstrip("/").split("/")[-1]


def _groups(options: FitOptions, shape: CacheShape) -> list[list[Source]]:
    """What is chosen together: keys and values of one layer at one offset. In the order of the moments' columns."""
    layers = options.candidates or tuple(range(shape.layers))
    return [
        [Source("key", layer, offset), Source("value", layer, offset)]
        for offset in sorted(options.offsets, reverse=True)
        for layer in sorted(layers)
    ]


def _check_window(options: FitOptions, sharer: Any, receiver: Any, prefix: int) -> None:
    for name, model in (("sharer", sharer), ("receiver", receiver)):
        longest = getattr(model.config, "max_position_embeddings", None)
        # another tokenizer may need more tokens for the same text
        if longest is not None and 2 * options.window + prefix > longest:
            raise ValueError(
                f"window is {options.window} tokens, the {name}'s context {longest}: at most {(longest - prefix) // 2} "
                "is wanted"
            )


def _sum(
    pair: Pair,
    corpus: Corpus,
    sources: list[Source],
    options: FitOptions,
    checkpoint: str | Path | None,
    update: Update,
) -> tuple[Moments, HeldOut, float]:
    """The moments of the corpus, the rows of its held-out part, and seconds in the normal equations."""
    width = sum(pair.sharer_shape.width(source) for source in sources)
    receiver = pair.receiver_shape
    targets = receiver.layers * receiver.kv_heads * (receiver.head_dim + receiver.value_dim)
    moments = Moments(width, targets)
    keeper = None
    done, spent = 0, 0.0
    if checkpoint is not None:
        settings = replace(options, layers_read=1, ridges=(1.0,), stretches=(1.0,), rank=None, checkpoint_seconds=0.0)
        made_for = {
            "corpus": corpus.sha256,
            "windows": corpus_hash(window.text for window in (*corpus.windows, *corpus.held_out)),
            "options": asdict(settings),
            "sharer": asdict(pair.plan.sharer_identity),
            "receiver": asdict(pair.plan.receiver_identity),
            "prefix": list(pair.plan.prefix),
        }
        keeper = Checkpoint(Path(checkpoint), "fit", made_for, options.checkpoint_seconds)
        if (kept := keeper.restore()) is not None:
            record, state = kept
            moments.load_state(state)
            done, spent = int(record["windows"]), float(record["seconds"])
    total = corpus.tokens
    read = sum(window.tokens for window in corpus.windows[:done])
    update("read", read, total)
    for at in range(done, len(corpus.windows), options.chunk):
        part = corpus.windows[at : at + options.chunk]
        x, y = _rows(pair, part, sources)
        began = time.perf_counter()
        moments.add(x, y)
        spent += time.perf_counter() - began
        del x, y  # before the next ones are made
        read += sum(window.tokens for window in part)
        update("read", read, total)
        if keeper is not None and (keeper.due() or at + len(part) == len(corpus.windows)):
            keeper.keep(partial(dict, windows=at + len(part), seconds=spent), moments.state)
    return moments, HeldOut(*_rows(pair, corpus.held_out, sources)), spent


def _rows(pair: Pair, windows: Sequence[Window], sources: list[Source]) -> tuple[Tensor, Tensor]:
    """(features, targets) of some windows, each written once where it stays."""
    room = sum(window.tokens for window in windows)
    x = y = torch.empty(0, 0)
    done = 0
    for window in windows:
        features, targets = pair.rows(window.text, sources)
        if done == 0 or done + len(features) > len(x):  # a piece may have some more tokens alone than in its document
            room = max(room + room // 16, done + len(features))
            x, y = _grown(x, done, room, features.shape[1]), _grown(y, done, room, targets.shape[1])
        x[done : done + len(features)] = features
        y[done : done + len(features)] = targets
        done += len(features)
    return x[:done], y[:done]


def _grown(rows: Tensor, kept: int, room: int, width: int) -> Tensor:
    """(room, width) that begins with the first `kept` rows."""
    grown = torch.empty(room, width)
    if kept:
        grown[:kept] = rows[:kept]
    return grown


def _solve(
    moments: Moments,
    held_out: HeldOut,
    groups: list[list[Source]],
    receiver: CacheShape,
    options: FitOptions,
    update: Update,
) -> list[_Layer]:
    width = moments.features // len(groups)
    spans = [torch.arange(number * width, (number + 1) * width) for number in range(len(groups))]
    keys, values = receiver.kv_heads * receiver.head_dim, receiver.kv_heads * receiver.value_dim
    count = options.layers_read * len(options.offsets)
    steps, middle = 0, sorted(options.ridges)[len(options.ridges) // 2]
    of = receiver.layers * (count + 1)
    layers: list[_Layer] = []
    choice = GroupChoice(moments, held_out, spans)

    def step() -> None:
        nonlocal steps
        steps += 1
        update("solve", steps, of)

    for number in range(receiver.layers):
        start = number * (keys + values)
        both = slice(start, start + keys + values)
        chosen = choice.choose(both, count, middle, step)
        columns = torch.cat([spans[group] for group in chosen])
        record: dict[str, Any] = {"groups": [list(groups[group][0][1:]) for group in chosen]}
        halves = []
        for name, targets in (("key", slice(start, start + keys)), ("value", slice(start + keys, both.stop))):
            ridge, _ = choose_ridge(moments, held_out, columns, targets, options.ridges)
            halves.append(affine(moments, columns, targets, ridge, options.rank))
            left = held_out.left_by(halves[-1], columns, targets)
            record[name] = {"ridge": ridge, "unexplained": round(left, 5)}
        sources = [source for group in chosen for source in groups[group]]
        layers.append(_Layer(sources, columns, (halves[0], halves[1]), record))
        step()
    return layers


def _stretch(
    pair: Pair,
    corpus: Corpus,
    frame: CacheProjector,
    layers: list[_Layer],
    means: Tensor,
    options: FitOptions,
    update: Update,
) -> tuple[list[_Layer], dict[str, Any]]:
    """The layers with their keys stretched by the factor that is best on held-out text, and what was tried.

    means: (targets,) float64 of what was fitted.
    """
    receiver = pair.receiver_shape
    keys, values = receiver.kv_heads * receiver.head_dim, receiver.kv_heads * receiver.value_dim

    def by(factor: float) -> list[_Layer]:
        found = []
        for number, layer in enumerate(layers):
            start = number * (keys + values)
            key = stretched(layer.halves[0], means[start : start + keys], factor)
            found.append(replace(layer, halves=(key, layer.halves[1])))
        return found

    def projector(factor: float) -> CacheProjector:
        update("stretch", tried.index(factor), len(tried))
        return _assemble(frame, by(factor), options.rank, {})

    tried = sorted(set(options.stretches))
    if len(tried) == 1:
        return by(tried[0]), {"factor": tried[0]}
    losses = choose_stretch(pair, [window.text for window in corpus.held_out], tried, projector)
    update("stretch", len(tried), len(tried))
    best = min(tried, key=lambda factor: losses[factor])
    return by(best), {"factor": best, "nats": {str(factor): round(losses[factor], 5) for factor in tried}}


@torch.no_grad()
def _assemble(frame: CacheProjector, layers: list[_Layer], rank: int | None, facts: dict[str, Any]) -> CacheProjector:
    """The projector with the maps that were found, columns in the order of its wide head."""
    projector = CacheProjector(
        frame.sharer,
        frame.receiver,
        [(layer.sources, layer.sources) for layer in layers],
        rank=rank,
        tokens=frame.tokens,
        strategy=frame.strategy,
        prefix=frame.prefix,
        sharer_identity=frame.sharer_identity,
        receiver_identity=frame.receiver_identity,
        facts=facts,
    )
    for found, layer in zip(layers, projector.maps, strict=True):
        for name, half, sources in zip(
            ("key", "value"), found.halves, (layer.key_sources, layer.value_sources), strict=True
        ):
            order = wide_columns(frame.sharer, sources)
            outward, inward = half.weight if isinstance(half.weight, tuple) else (half.weight, None)
            proj, into = getattr(layer, f"{name}_proj"), getattr(layer, f"{name}_proj_in")
            if inward is None:
                proj.copy_(outward[:, order].reshape(proj.shape))
            else:
                proj.copy_(outward.reshape(proj.shape))
                into.copy_(inward[:, order])
            bias = getattr(layer, f"{name}_bias")
            bias.copy_(half.bias.reshape(bias.shape))
    return projector
