"""Fused kernels for Cache-to-Cache communication between language models (arXiv 2510.03215)."""

from ._version import __version__
from .backends import Backend, backends
from .fuser_weights import FuserBlock, FuserHalf, FuserWeights
from .fusers import C2CFuser, fuse_caches
from .ops import FuseCall, fuse_kv, fuse_layers, merge_states, merged_attention, project_kv, quantize_kv
from .projectors import CacheProjector, LinearProjector
from .segment import Rope, SharerSegment

backends()  # found once, here, where nothing traces

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
