"""How this folder's tests run the CUDA backend: simulated, on CPU tensors (bench/cuda_simulator.py).

With C2C_CUDA_DEVICE=cuda the same tests run on that device: tensors are copied there, results and outputs back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cuda_simulator
import torch
from cuda_simulator import Ran, chosen
from triton_device import here, there

import c2c_kernels as c2c
from c2c_kernels.backends import cuda

DEVICE = os.environ.get("C2C_CUDA_DEVICE", "")
ARCHS = (80,) if DEVICE else cuda_simulator.ARCHS  # of the simulator; a device runs what it runs


def missing() -> str:
    """Why the kernels cannot run here; "" where they can."""
    if not DEVICE or cuda._cuda is None:
        return cuda_simulator.missing()
    return "" if torch.cuda.is_available() else "torch finds no GPU"


class Simulator(cuda_simulator.Simulator):
    """The simulator, or the device in its place; launches are then told, not simulated."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[Simulator]:
        with chosen(self.on_device()) if DEVICE else super().installed():
            yield self

    def on_device(self) -> Any:
        """The backend's functions on copies of their tensors on the device."""

        def tell(launch: cuda.Launch) -> None:
            self.ran.append(Ran(launch, None))

        def project_kv(*call: Any) -> None:
            with cuda.executed_by(self.arch, tell):
                cuda.project_kv(*call)
            copies = there(call, torch.device(DEVICE))
            cuda.project_kv(*copies)
            for out, copy in zip(call[3:5], copies[3:5], strict=True):
                out.copy_(copy)

        def fuse_kv_layers(backend: str, calls: Any) -> None:
            with cuda.executed_by(self.arch, tell):
                cuda.fuse_kv_layers(backend, calls)
            copies = there(calls, torch.device(DEVICE))
            cuda.fuse_kv_layers(backend, copies)
            for call, copy in zip(calls, copies, strict=True):
                for out, result in zip(call[-2:], copy[-2:], strict=True):
                    out.copy_(result)

        def by_name(name: str) -> Any:
            def run(*call: Any) -> Any:
                with cuda.executed_by(self.arch, tell):
                    getattr(cuda, name)(*call)
                return here(getattr(cuda, name)(*there(call, torch.device(DEVICE))))

            return run

        returning = {name: by_name(name) for name in ("merged_attention", "merge_states", "quantize")}
        return SimpleNamespace(
            **returning, project_kv=project_kv, refusal=cuda.refusal,
            fuse_kv=lambda backend, *call: fuse_kv_layers(backend, [call]), fuse_kv_layers=fuse_kv_layers,
        )  # fmt: skip


def attend(call: dict, arch: int, maps: bool = True, **options: Any) -> tuple[tuple, Simulator]:
    """`merged_attention` with the arguments that `attention_cases.build` makes: out, lse and mass, and the launches."""
    options = {name: value for name, value in call.items() if name not in ("query", "key", "value")} | options
    with Simulator(arch, maps=maps).installed() as simulated:
        results = c2c.merged_attention(
            call["query"], call["key"], call["value"], **options, return_lse=True, return_mass=True, backend="cuda"
        )
    return results, simulated
