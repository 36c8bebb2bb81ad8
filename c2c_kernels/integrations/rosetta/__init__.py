"""Fusers trained with `rosetta`, the reference implementation of the C2C paper (github thu-nics/C2C).

fusers = load_checkpoint("C2C_0.6+0.5/final")       # its files, without importing it
model = C2CModel(receiver, [sharer], fusers)        # on today's Transformers
model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64)

accelerate(rosetta_model)                           # or: a live RosettaModel on our kernels; restore() undoes it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from c2c_kernels.integrations.rosetta.accelerate import accelerate, restore
from c2c_kernels.integrations.rosetta.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from c2c_kernels.integrations.rosetta.model import C2CModel, Prefilled, Section

__all__ = [
    "C2CModel",
    "CheckpointError",
    "Prefilled",
    "Section",
    "accelerate",
    "load_checkpoint",
    "restore",
    "save_checkpoint",
]
_OF_TRANSFORMERS = ("C2CModel", "Prefilled", "Section")


def __getattr__(name: str) -> Any:
    """What needs Transformers is imported when it is asked for: checkpoints are read without."""
    if name in _OF_TRANSFORMERS:
        from c2c_kernels.integrations.rosetta import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
