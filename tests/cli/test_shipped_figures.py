"""What the pages say of the projector that ships is what `c2c-kernels evaluate` wrote beside it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from c2c_kernels.cli import evaluated
from c2c_kernels.evaluate import ARMS

ROOT = Path(__file__).parents[2]
SHIPPED = Path(str(resources.files("c2c_kernels"))) / "data" / "projectors" / "gemma3-smollm2.safetensors"
FOUND: dict[str, Any] = json.loads(SHIPPED.with_suffix(".json").read_text(encoding="utf-8"))
KINDS = {"handbook": "handbook", "manual": "manual pages", "fortunes": "fortunes"}
LOSSES = {kind["name"]: kind for kind in FOUND["loss"]}
[FACTS] = FOUND["questions"]


def page(name: str) -> str:
    """With one space in place of every gap."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def share(found: dict[str, float]) -> str:
    return f"{found['value']:.0%} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def test_they_are_this_files():
    assert evaluated.find(SHIPPED) == FOUND
    assert list(LOSSES) == sorted(KINDS)


def test_the_page_on_training_has_every_figure():
    text = page("docs/training.md")
    for kind, name in KINDS.items():
        losses = " | ".join(f"{LOSSES[kind]['loss'][arm]['value']:.3f}" for arm in ARMS)
        shares = " | ".join(share(LOSSES[kind]["recovered"][arm]) for arm in ("projected", "mismatched", "noise"))
        assert f"| {name} | {losses} | {shares} |" in text
    for heading, figure in (("right", "accuracy"), ("nothing but the answer", "exact"), ("of the text's", "relative")):
        assert f"| {heading} | {' | '.join(share(FACTS[figure][arm]) for arm in ARMS)} |" in text


def test_the_readme_and_the_page_on_pairs_quote_them():
    projected = {kind: share(LOSSES[kind]["recovered"]["projected"]) for kind in KINDS}
    other = [f"{LOSSES[kind]['recovered']['mismatched']['value']:.0%}" for kind in KINDS]
    facts = share(FACTS["relative"]["projected"])
    assert (
        f"recovers {projected['handbook']} of the loss gap between no context and the text on held-out handbook pages, "
        f"{projected['manual']} on manual pages and {projected['fortunes']} on fortunes, another document's cache "
        f"{other[0]}, {other[1]} and {other[2]}; of made-up facts {facts} of those that are answered right with the "
        "text."
    ) in page("README.md")
    assert f"carry {facts} of the made-up facts that the text itself does" in page("docs/pairs.md")
