"""What `c2c-kernels evaluate --json` wrote about the projectors in the package; one file lies beside each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from c2c_kernels.cli.cache import sha256

_NAMES = {"handbook": "handbook pages", "manual": "manual pages"}


def find(projector: Path) -> dict[str, Any] | None:
    """The evaluation of a projector file, None where there is none or it is another file's."""
    beside = projector.with_suffix(".json")
    if not beside.is_file():
        return None
    found: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
    return found if found["projector_sha256"] == sha256(projector) else None


def figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Its shares with their intervals, without documents and answers."""
    return {
        "loss": [{name: one[name] for name in ("name", "documents", "recovered")} for one in evaluation["loss"]],
        "questions": [
            {name: one[name] for name in ("name", "questions", "accuracy", "relative")}
            for one in evaluation["questions"]
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What `figures` gives as text."""
    written = []
    for one in found["loss"]:
        projected, mismatched = (_share(one["recovered"][arm]) for arm in ("projected", "mismatched"))
        what = f"{one['documents']} {_NAMES.get(one['name'], one['name'])}"
        written.append(f"{what}: {projected} of the loss gap recovered, through a mismatched cache {mismatched}")
    for one in found["questions"]:
        right = {arm: _share(share) for arm, share in one["accuracy"].items()}
        written.append(
            f"{one['questions']} questions about made-up texts: {right['projected']} right, with the text "
            f"{right['text']}, through a mismatched cache {right['mismatched']}"
        )
    return written


def _share(found: dict[str, float]) -> str:
    return f"{found['value']:.0%} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
