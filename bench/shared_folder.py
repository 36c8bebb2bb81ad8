"""Where the folder `shared/` is: material that is not part of the checkout."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shared_folder(name: str) -> Path | None:
    """`name` of shared/ in or beside the checkout, or of $C2C_SHARED; None where there is none."""
    places = [ROOT / "shared", ROOT.parent / "shared", *map(Path, filter(None, [os.environ.get("C2C_SHARED")]))]
    return next((place / name for place in places if (place / name).is_dir()), None)
