"""Where files are kept that can be made again: models, corpora, tiles found by tuning."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT_VARIABLE = "C2C_CACHE_DIR"


def cache_dir() -> Path:
    """$C2C_CACHE_DIR, else c2c-kernels under the user's cache folder."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "c2c-kernels"
