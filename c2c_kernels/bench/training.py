"""One training step through our operators beside the same mathematics in plain PyTorch autograd.

    python -m c2c_kernels.bench.training            # JSON: seconds, and peak memory above what is held before

A receiver of SmolLM2-135M's size with random weights reads 128 own tokens after 2,048 that a sharer of Gemma 3 270M's
shape has read; every receiver layer maps keys and values of 3 sharer layers. Forward, loss and backward; the sharer's
read, the teacher and the optimiser are the same on both sides and left out. Plain PyTorch removes rotations once per
sharer layer, projects by matrix products, rotates, and hands keys and values as a cache to the model with SDPA. It has
no gates. Memory is that of one step in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from c2c_kernels.bench.timing import Effort, alternate
from c2c_kernels.projectors import CacheProjector, CacheShape, Source, TokenPlan
from c2c_kernels.training.batches import Batch
from c2c_kernels.training.trainee import Trainee

WAYS = ("ours", "plain")
_SHARER_LAYERS_READ = 3


@dataclass(frozen=True)
class Size:
    """Of the step: tokens that the sharer has read, own tokens, layers of the receiver (all widths are SmolLM2's)."""

    shared: int = 2048
    own: int = 128
    layers: int = 30
    gates: bool = True


_NUMBERS = {"shared": Size.shared, "own": Size.own, "layers": Size.layers}


class Setting:
    """Models, maps, a sharer's cache and tokens, random but the same for the same size."""

    def __init__(self, size: Size) -> None:
        from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

        AttentionInterface.register("plain", _attend)

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=size.layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        self.size = size
        self.receiver = LlamaForCausalLM(config).eval().requires_grad_(False)
        sharer = CacheShape(
            18, 1, 256, 256, (_frequencies(256, 10_000.0), _frequencies(256, 1e6)), (0,) * 5 + (1,) + (0,) * 12
        )
        receiver = CacheShape(size.layers, 3, 64, 64, (_frequencies(64, 100_000.0),), (0,) * size.layers)
        sources = [
            [
                Source(kind, (layer * 18 // size.layers + at) % 18)
                for at in range(_SHARER_LAYERS_READ)
                for kind in _KINDS
            ]
            for layer in range(size.layers)
        ]
        self.projector = CacheProjector(sharer, receiver, [(found, found) for found in sources])
        with torch.no_grad():
            for parameter in self.projector.parameters():
                parameter.normal_(0, 0.02)
        if size.gates:
            self.projector.add_gates(9)
        self.cache = [(torch.randn(1, 1, size.shared, 256), torch.randn(1, 1, size.shared, 256)) for _ in range(18)]
        index = torch.arange(size.shared)
        ids = torch.randint(49152, (1, size.own + 1))
        self.batch = Batch(
            sharer_ids=index[None],
            plan=TokenPlan(index[None], index[None], torch.tensor([size.shared])),
            head_ids=torch.zeros(1, 0, dtype=torch.long),
            head_lengths=torch.tensor([0]),
            text_ids=index[None],
            window=torch.tensor([0]),
            visible=torch.tensor([size.shared]),
            offset=torch.tensor([size.shared]),
            own_ids=ids[:, :-1],
            targets=ids[:, 1:],
            inside=False,
        )
        self._trainee: Trainee | None = None

    def step(self, way: str) -> Tensor:
        """The loss, after its backward pass; gradients are where they belong."""
        self.projector.zero_grad(set_to_none=True)
        loss = self._ours() if way == "ours" else self._plain()
        loss.backward()
        return loss.detach()

    def gradients(self, way: str) -> dict[str, Tensor]:
        """Of every parameter, and the loss."""
        loss = self.step(way)
        found = {name: parameter.grad for name, parameter in self.projector.named_parameters()}
        return {"loss": loss, **{name: grad for name, grad in found.items() if grad is not None}}

    def _ours(self) -> Tensor:
        from c2c_kernels.integrations.transformers import enable

        if self._trainee is None:
            self._trainee = Trainee(self.projector, self.receiver, self.receiver)
        enable(self.receiver.base_model)
        return self._trainee(self.batch, self.cache)[0]

    def _plain(self) -> Tensor:
        from transformers import DynamicCache

        self.receiver.base_model.set_attn_implementation("plain" if self.size.gates else "sdpa")
        shape, receiver, index = self.projector.sharer, self.projector.receiver, self.batch.plan.index[0]
        plain: dict[Source, Tensor] = {}
        tables = {kind: shape.table([kind_layer], index) for kind, kind_layer in ((0, 0), (1, 5))}
        with torch.no_grad():
            for layer, (key, value) in enumerate(self.cache):
                cos, sin = tables[shape.layer_frequencies[layer]]
                plain[Source("key", layer)] = _rotated(key[0, 0], cos, -sin)[index]
                plain[Source("value", layer)] = value[0, 0][index]
        cos, sin = receiver.table([0], index)
        past = DynamicCache()
        for number, maps in enumerate(self.projector.maps):
            # columns in the order of the sources' halves, as the maps have them
            x = torch.cat([plain[s][:, :128] for s in maps.key_sources if s.kind == "key"] +
                          [plain[s][:, 128:] for s in maps.key_sources if s.kind == "key"] +
                          [plain[s] for s in maps.key_sources if s.kind == "value"], dim=1)  # fmt: skip
            key, value = (
                F.linear(x, getattr(maps, f"{half}_proj").flatten(0, 1), getattr(maps, f"{half}_bias").flatten())
                .unflatten(1, (3, 64))
                .transpose(0, 1)[None]
                for half in _KINDS
            )
            past.update(_rotated(key, cos, sin), value, number)
        gates = self.projector.gates()
        biases = None
        if gates is not None:
            shared, own = self.size.shared, self.size.own
            hidden = torch.full((own, own), -torch.inf).triu(1).expand(9, -1, -1)
            biases = [
                torch.cat([gate.log()[:, None, None].expand(-1, own, shared), hidden], dim=2)[None] for gate in gates
            ]
        out = self.receiver(
            biases=biases,
            input_ids=self.batch.own_ids,
            position_ids=torch.arange(self.size.shared, self.size.shared + self.size.own)[None],
            past_key_values=past,
            use_cache=True,
        )
        return F.cross_entropy(out.logits[0].float(), self.batch.targets[0])


_KINDS: tuple[Any, ...] = ("key", "value")


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any) -> tuple[Tensor, None]:
    """SDPA with a bias of each layer's own: what gates are to it."""
    bias = given["biases"][module.layer_idx]
    out = F.scaled_dot_product_attention(query, key, value, bias, scale=given["scaling"], enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _frequencies(dim: int, base: float) -> tuple[float, ...]:
    return tuple((base ** -(torch.arange(0, dim, 2) / dim)).tolist())


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def differing(size: Size) -> str:
    """Where ours and plain PyTorch disagree by more than rounding, "" where nowhere."""
    setting = Setting(size)
    ours, plain = setting.gradients("ours"), setting.gradients("plain")
    for name, wanted in plain.items():
        error = float((ours[name] - wanted).abs().max() / wanted.abs().max())
        if not error < 1e-3:
            return f"{name} differs by {error:.2g} of its largest value"
    return ""


def seconds(size: Size, effort: Effort) -> dict[str, float]:
    """Medians of alternating steps."""
    setting = Setting(size)
    calls: dict[str, Callable[[], Tensor]] = {way: lambda way=way: setting.step(way) for way in WAYS}  # type: ignore[misc]
    for call in calls.values():
        call()
    return {way: found.median for way, found in alternate(calls, effort, warm=False).items()}


def peak(way: str, size: Size) -> int:
    """Bytes that one step holds at most above what the process holds before it; run it in a process of its own."""
    setting = Setting(replace(size, shared=64, own=8))  # what is loaded and set up once
    setting.step(way)
    setting = Setting(size)
    if not _STATUS.exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        setting.step(way)
        unit = 1 if sys.platform == "darwin" else 1024
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    before, most, done = _allocated(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(1e-3):
            most.append(max(most.pop(), _allocated()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        setting.step(way)
    finally:
        done.set()
        watcher.join()
    return max(most[0], _allocated()) - before


_STATUS = Path("/proc/self/status")


def _allocated() -> int:
    """Bytes that are the process's own, in memory or swapped out.

    Pages of files, which the kernel drops and reads again as it likes (of torch's libraries some 400 MB), are not among
    them: the kernel's own peak (VmHWM) counts those.
    """
    found = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return sum(int(found[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m c2c_kernels.bench.training", description=(__doc__ or "").strip())
    for name, default in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    parser.add_argument("--no-gates", action="store_true", help="on neither side")
    parser.add_argument("--peak", choices=WAYS, help="measure the memory of one of them alone")
    parser.add_argument("--seconds", type=float, default=12.0, metavar="N", help="for each of them (12)")
    options = parser.parse_args(arguments)
    size = Size(options.shared, options.own, options.layers, not options.no_gates)
    if options.peak:
        sys.stdout.write(f"{peak(options.peak, size)}\n")
        return 0
    problem = differing(replace(size, shared=min(size.shared, 256), own=min(size.own, 32)))
    if problem:
        sys.stderr.write(f"not timed: {problem}\n")
        return 1
    times = seconds(size, Effort(options.seconds, 3, 9))
    command = [sys.executable, "-m", "c2c_kernels.bench.training"]
    command += [part for name, value in ((n, getattr(size, n)) for n in _NUMBERS) for part in (f"--{name}", str(value))]
    command += ["--no-gates"] if options.no_gates else []
    peaks = {
        way: int(subprocess.run([*command, "--peak", way], check=True, capture_output=True, text=True).stdout)
        for way in WAYS
    }
    found = {
        **asdict(size),
        "threads": torch.get_num_threads(),
        "seconds": times,
        "times_faster": times["plain"] / times["ours"],
        "peak_bytes": peaks,
        "share_of_memory": peaks["ours"] / peaks["plain"],
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
