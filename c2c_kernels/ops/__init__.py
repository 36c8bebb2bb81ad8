"""One file per operator: documented function, schema, fake, autograd. What they refuse is in `_checks`."""

from .fuse_kv import FuseCall, fuse_kv, fuse_layers
from .merge_states import merge_states
from .merged_attention import merged_attention
from .project_kv import project_kv
from .quantize_kv import quantize_kv

__all__ = ["FuseCall", "fuse_kv", "fuse_layers", "merge_states", "merged_attention", "project_kv", "quantize_kv"]
