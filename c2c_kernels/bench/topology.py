"""What the operating system says about the processor: model, cores, last-level cache, memory."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_ASSUMED_CACHE = 32 * 2**20
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cores() -> list[int]:
    """Numbers of the logical processors that this process may use."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return list(range(os.cpu_count() or 1))


def last_level_cache(threads: int) -> tuple[int, str]:
    """Bytes of last-level cache that `threads` threads reach together, and where the number comes from.

    Each thread is taken to sit by a cache of its own where there are several.
    """
    found = {entry for number in cores() if (entry := _largest_cache(_CPUS / f"cpu{number}" / "cache"))}
    if found:
        level, size = max((level, size) for level, size, _ in found)
        instances = sum(entry[0] == level for entry in found)
        return size * min(instances, max(threads, 1)), f"L{level}"
    for name in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"):
        size = _integer(_sysctl(name))
        if size:
            return size, name
    return _ASSUMED_CACHE, "assumed: the system does not say"


def _largest_cache(folder: Path) -> tuple[int, int, str] | None:
    """(level, bytes, processors that share it) of the highest level that holds data."""
    caches = []
    for index in folder.glob("index*"):
        kind, level, size, shared = (_text(index / name) for name in ("type", "level", "size", "shared_cpu_list"))
        if kind != "Instruction" and level.isdigit() and size:
            caches.append((int(level), _integer(size.rstrip("KMG")) * _UNITS.get(size[-1], 1), shared))
    return max(caches, default=None)


def cpu_model() -> str:
    """The processor's name."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, also under a container's limit; None where the system does not say."""
    found = [_group_memory()]
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(_integer(line.split()[1]) * 1024)
    return min((room for room in found if room is not None), default=None)


def _group_memory() -> int | None:
    """What is left of the control group's limit, file caches not counted as used; None where there is no limit."""
    limit, used = _text(_CGROUP / "memory.max"), _text(_CGROUP / "memory.current")
    if not (limit.isdigit() and used.isdigit()):
        return None
    counts = dict(line.split() for line in _text(_CGROUP / "memory.stat").splitlines())
    return max(0, int(limit) - int(used) + _integer(counts.get("inactive_file", "")))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _integer(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
