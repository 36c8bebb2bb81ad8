"""Which model and tokenizer something was made for: hashes of what they compute, not of files.

A model has the same hash in float32 and in bfloat16; a tokenizer the same however it was stored.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from .projectors import Identity

# Entries of a configuration that change nothing about what the model computes.
_INCIDENTAL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
_PART = 1 << 24  # weights that are rounded at a time
_PROBES = (
    "The cat is Admiral; she'll sleep in 1987, they've 9,000 books.",
    "  two blanks\n\n\nthree lines\t\ttabs   \r\n end ",
    "naïve café ß ﬁ 日本語 한국어 العربية हिन्दी Ελληνικά 😀👩‍👩‍👧 e\u0301 \u2028 \x00\x7f",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # <bos> <|im_start|>user",
)


def model_hash(model: Any) -> str:
    """SHA-256 of a Transformers model's configuration and weights, the weights rounded to bfloat16."""
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if name not in _INCIDENTAL}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        for part in parameter.detach().flatten().split(_PART):
            digest.update(part.to("cpu", torch.bfloat16).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and of what it makes of some difficult texts."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for text in _PROBES:
        digest.update(json.dumps(list(tokenizer(text).input_ids)).encode())
    return digest.hexdigest()


def identify(model: Any, tokenizer: Any, name: str = "") -> Identity:
    """The identity of a model and its tokenizer."""
    return Identity(name, model_hash(model), tokenizer_hash(tokenizer))


def check_identity(role: str, wanted: Identity, came: Identity) -> None:
    """ValueError unless model and tokenizer are the ones that a projector was made for.

    Args:
        role: "sharer" or "receiver", for the error.
        wanted: of the projector; empty hashes are not compared.
        came: of the model at hand.
    """
    for part in ("model", "tokenizer"):
        ours, theirs = getattr(wanted, part), getattr(came, part)
        if ours and ours != theirs:
            raise ValueError(
                f"the {role}'s {part} {came.name or '(unnamed)'} has SHA-256 {theirs[:16]}..., the projector was made "
                f"for {wanted.name or '(unnamed)'} with {ours[:16]}..."
            )
