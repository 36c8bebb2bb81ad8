"""What a figure depends on besides the code: device, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import c2c_kernels as c2c
from c2c_kernels.backends import choose
from c2c_kernels.bench import gpu, topology

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "transformers", "numpy")
_ON_GPUS = ("triton", "flash-attn", "flashinfer-python")


def collect(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Device (of a GPU its name and architecture), processor, backend, instruction set, threads,
    versions, commit and date, as plain data.

    Raises:
        ValueError: the environment asks for a backend that cannot run here.
    """
    record = choose("merged_attention", None, torch.device(device), torch.float32)
    on_gpu = device != "cpu"
    return {
        "device": device,
        "gpu": gpu.name(torch.device(device)) if on_gpu else None,
        "cpu": topology.cpu_model(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": len(topology.cores()),
        "threads": threads,
        "backend": record.name,
        "isa": gpu.capability(torch.device(device)) if on_gpu else record.isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "c2c-kernels": c2c.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
            **({"cuda": torch.version.cuda, **{name: _version(name) for name in _ON_GPUS}} if on_gpu else {}),
        },
        "commit": commit(),
        "load": round(_load(), 2),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where tracked files differ from it; None outside a checkout."""
    if not (_ROOT / "csrc" / "include" / "c2c.h").is_file():
        return None
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _load() -> float:
    """Mean number of busy processes in the last minute."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
