"""`c2c-kernels info`: what runs on this machine and why the rest does not."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

import torch

import c2c_kernels as c2c

_OPTIONAL = ("transformers", "triton", "gguf", "rich", "matplotlib")


def collect() -> dict[str, Any]:
    """Versions, threads, instruction set and the backends, as plain data."""
    records = c2c.backends()
    return {
        "versions": {
            "c2c-kernels": c2c.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in _OPTIONAL},
        },
        "machine": platform.machine(),
        "isa": next((record.isa for record in records if record.name == "cpu"), ""),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": [
            {
                "name": record.name,
                "available": record.available,
                "reason": record.reason,
                "devices": list(record.devices),
                "dtypes": list(record.dtypes),
                "isa": record.isa,
                "verified": record.verified,
            }
            for record in records
        ],
    }


def text(info: dict[str, Any]) -> str:
    """The same for people."""
    versions = {name: version or "not installed" for name, version in info["versions"].items()}
    width = max(len(name) for name in (*versions, "instruction set"))
    lines = [f"{name:<{width}}  {version}" for name, version in versions.items()]
    lines += [
        f"{'machine':<{width}}  {info['machine']}",
        f"{'instruction set':<{width}}  {info['isa'] or 'unknown'}",
        f"{'threads':<{width}}  {info['threads']}",
        f"{'CUDA devices':<{width}}  {', '.join(info['devices']) or 'none'}",
        "",
        "backends, fastest first",
    ]
    for record in info["backends"]:
        if record["available"]:
            devices = ", ".join(record["devices"]) or "where asked for by name"
            what = f"{devices}; {', '.join(record['dtypes'])}"
            what += f"; {record['isa']}" if record["isa"] else ""
        else:
            what = f"not available: {record['reason']}"
        lines.append(f"  {record['name']:<10}  {what}")
        if record["verified"]:
            lines.append(f"{'':<14}verified: {record['verified']}")
    return "\n".join(lines)


def run(as_json: bool) -> int:
    """Prints it."""
    info = collect()
    print(json.dumps(info, indent=2) if as_json else text(info))
    return 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
