"""Fused kernels for Cache-to-Cache communication between language models (arXiv 2510.03215)."""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .backends import Backend, backends
from .fuser_weights import FuserBlock, FuserHalf, FuserWeights
from .ops import FuseCall, fuse_kv, fuse_layers, merge_states, merged_attention, project_kv, quantize_kv
from .segment import Rope, SharerSegment

if TYPE_CHECKING:
    from .fusers import C2CFuser, fuse_caches
    from .projectors import CacheProjector, LinearProjector

backends()  # found once, here, where nothing traces

_MODULES = {
    "C2CFuser": "fusers",
    "CacheProjector": "projectors",
    "LinearProjector": "projectors",
    "fuse_caches": "fusers",
}  # imported where they are asked for: operators alone need none of it

__all__ = [
    "Backend",
    "C2CFuser",
    "CacheProjector",
    "FuseCall",
    "FuserBlock",
    "FuserHalf",
    "FuserWeights",
    "LinearProjector",
    "Rope",
    "SharerSegment",
    "__version__",
    "backends",
    "fuse_caches",
    "fuse_kv",
    "fuse_layers",
    "merge_states",
    "merged_attention",
    "project_kv",
    "quantize_kv",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
