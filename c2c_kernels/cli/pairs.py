"""A projector file and the two models that it was made for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_kernels import corpus
from c2c_kernels.cli.errors import CommandError

if TYPE_CHECKING:
    from c2c_kernels.evaluate import Reader

SHARER, RECEIVER = "google/gemma-3-270m", "HuggingFaceTB/SmolLM2-135M-Instruct"


def add_arguments(parser: argparse.ArgumentParser, *, optional: str = "") -> None:
    """What names a projector and its models. `optional`: what is said of a file that need not be given."""
    parser.add_argument(
        "projector",
        metavar="FILE.safetensors",
        nargs="?" if optional else None,
        help=optional or "what `c2c-kernels fit` wrote",
    )
    model = "Hugging Face id, model folder or .gguf file"
    parser.add_argument("--sharer", default=SHARER, metavar="MODEL", help=f"{model} ({SHARER})")
    parser.add_argument("--receiver", default=RECEIVER, metavar="MODEL", help=f"{model} ({RECEIVER})")


def check_file(path: str) -> None:
    """CommandError where there is no file at `path`."""
    if not Path(path).is_file():
        raise CommandError(f"{path} does not exist: a projector file is wanted")


def load_pair(
    path: str,
    sharer: str,
    receiver: str,
    *,
    unseen: Sequence[corpus.Document] = (),
    threads: int | None = None,
    dtype: str = "float32",
    backend: str | None = None,
    maps: str | None = None,
    known: dict[str, Any] | None = None,
) -> Reader:
    """The projector and its models, the receiver patched.

    Args:
        path: of the projector.
        sharer, receiver: what the models are asked for by.
        unseen: documents that the projector must not have been fitted on; looked at before a model is loaded.
        threads: of torch; None: as they are.
        dtype: of the models.
        backend: of the receiver's attention and of the maps; None: the fastest.
        maps: dtype of the maps; None: that of the models.
        known: models that were loaded before, by what they were asked for by; new ones are added.

    Raises:
        CommandError: for a damaged file, documents of the fit, and models that the projector was not made for.
    """
    import torch

    from c2c_kernels.cli.models import load_model
    from c2c_kernels.evaluate import Reader, check_unseen
    from c2c_kernels.identity import check_identity, identify
    from c2c_kernels.integrations.transformers import enable
    from c2c_kernels.projectors import CacheProjector

    if threads is not None:
        torch.set_num_threads(threads)
    check_file(path)
    known = {} if known is None else known
    try:
        projector = CacheProjector.load(path).to(getattr(torch, maps or dtype)).eval()
    except (ValueError, TypeError) as error:  # names the file itself
        raise CommandError(str(error)) from error
    try:
        if unseen:
            check_unseen(projector, unseen)
        for role, spec in (("sharer", sharer), ("receiver", receiver)):
            if spec not in known:
                loaded = load_model(spec, getattr(torch, dtype))
                known[spec] = (*loaded, identify(*loaded, spec))
            check_identity(role, getattr(projector, f"{role}_identity"), known[spec][2])
        enable(known[receiver][0], backend=backend)
    except (ValueError, TypeError) as error:
        raise CommandError(f"{path}: {error}") from error
    return Reader(known[sharer][0], known[receiver][0], known[sharer][1], known[receiver][1], projector, backend)
