"""`c2c-kernels tune`: the Triton kernels' tiles by measurement, kept in the cache folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from c2c_kernels.backends import triton_record
from c2c_kernels.cli.errors import CommandError

if TYPE_CHECKING:
    from c2c_kernels.backends.triton.tuning import Tuned

_KERNELS = ("prefill", "decode", "backward")
_DTYPES = ("bfloat16", "float16", "float32")
_DIMS = (64, 128, 256)


def add_parser(commands: Any) -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "tune",
        help="time the Triton kernels with other tiles on this GPU and keep the fastest",
        description="Starts from the tiles that ship and goes by single steps to faster ones; what is found is kept in "
        "the cache folder for this device and this triton, and used from the next process on. Without a tuning the "
        "shipped tiles are used; nothing is ever timed but by this command.",
    )
    parser.add_argument("--kernel", action="append", choices=_KERNELS, help="which (repeatable; default: all)")
    parser.add_argument(
        "--head-dim", action="append", type=int, choices=_DIMS, help="padded head dims (repeatable; default: 64, 128)"
    )
    parser.add_argument("--dtype", action="append", choices=_DTYPES, help="of caches (repeatable; default: bfloat16)")
    parser.add_argument("--device", default="cuda", metavar="NAME", help="which GPU, such as cuda:1 (cuda)")


def run(options: argparse.Namespace) -> int:
    """Tunes, stores what every kernel's search has found as soon as it ends, and says so; returns the exit status."""
    device = _device(options.device)
    from c2c_kernels.backends.triton import tuned, tuning
    from c2c_kernels.backends.triton.launch import target_of

    _, problem = tuned.read(tuned.path())
    if problem:
        print(f"{problem}; it is written anew")
    target = target_of(device)
    print(tuned.device_name(target))
    for kernel in options.kernel or _KERNELS:
        for dim in options.head_dim or _DIMS[:2]:
            for dtype in options.dtype or _DTYPES[:1]:
                for rows in tuning.ROWS[kernel]:
                    try:
                        found = tuning.tune(device, kernel, dim, getattr(torch, dtype), rows, tuning.gpu_seconds)
                        tuned.store(target, {found.key: found.best})
                    except ValueError as error:
                        raise CommandError(str(error)) from error
                    except OSError as error:
                        raise CommandError(f"{tuned.path()} cannot be written: {error.strerror or error}") from error
                    print(_line(found))
    print(f"kept in {tuned.path()}")
    return 0


def _line(found: Tuned) -> str:
    tile = ", ".join(f"{name} {value}" for name, value in found.best._asdict().items())
    gain = found.shipped_seconds / found.best_seconds
    times = f"{found.best_seconds * 1e6:.1f} us, {gain:.2f}x the speed of the shipped tile ({found.tried} tried)"
    return f"{found.key!s:<34} {tile}: {times}"


def _device(name: str) -> torch.device:
    """CommandError where there is nothing to measure on."""
    record = triton_record()
    if not record.available:
        raise CommandError(f"tune measures on a GPU, and the triton backend is not available: {record.reason}")
    if record.isa == "interpreter":
        raise CommandError("tune measures on a GPU; TRITON_INTERPRET=1 runs the kernels without one: unset it")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device must name a GPU such as cuda:0, got {name!r}") from error
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        raise CommandError(f"--device must be one of {there}; got {name!r}")
    refusal = record.refusal(device, torch.bfloat16)
    if refusal:
        raise CommandError(f"--device {name}: {refusal}")
    return device
