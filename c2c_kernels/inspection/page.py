"""The record as one HTML page that needs nothing else: no scripts, styles, fonts or images from elsewhere."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from c2c_kernels.inspection.look import Look

_PLACE = "/*DATA*/"
_STRONGEST = 5
_DIGITS = 6  # of a share, in the page


def write_page(look: Look, path: Path) -> None:
    """Writes the page, in place at once or not at all."""
    page = (resources.files("c2c_kernels") / "data" / "inspect.html").read_text(encoding="utf-8")
    before, place, after = page.partition(_PLACE)
    assert place, f"{_PLACE} is missing in the page"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(before + _script(_data(look)) + after, encoding="utf-8", errors="replace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _data(look: Look) -> dict[str, Any]:
    return {
        "about": look.about,
        "words": list(look.words),
        "answer": list(look.answer),
        "byHead": _rows(look.by_head),
        "byWord": _rows(look.by_word),
        "drawnOn": _rows(look.drawn_on),
        "gates": None if look.gates is None else _rows(look.gates),
        "strongest": look.strongest(_STRONGEST),
    }


def _rows(values: Tensor) -> list[list[float]]:
    return [[round(value, _DIGITS) for value in row] for row in values.tolist()]


def _script(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever the texts hold."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
