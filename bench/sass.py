"""Machine code of a GPU kernel: how many other instructions a pass of its innermost loop has per matrix instruction."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_PRODUCT, _GROUP_PRODUCT = re.compile(r"\bHMMA"), re.compile(r"\bHGMMA\.64x(\d+)x16\b")
_COPY = re.compile(r"\b(LDGSTS|HGMMA)")  # what HGMMA multiplies another warp has had copied


class Count(NamedTuple):
    """Instructions of some code: matrix products, copies to shared memory, all others (copies too).

    A product of a warp group, 64 x N x 16, counts as the N / 8 products 16 x 8 x 16 that it saves each warp.
    """

    products: int
    copies: int
    others: int


class Block(NamedTuple):
    """Instructions that run one after another, and the numbers of the blocks that may come next."""

    count: Count
    following: tuple[int, ...]


def disassembler() -> str | None:
    """nvdisasm, of the toolkit or of triton's wheel."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("triton")
    for folder in (spec and spec.submodule_search_locations) or ():
        beside = Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm"
        if beside.exists():
            return str(beside)
    return None


def disassembled(cubin: Path, program: str) -> dict[str, str]:
    """The code of every kernel of a cubin."""
    text = subprocess.run([program, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(code: str) -> list[Block]:
    """The control flow of a kernel, in the order of its addresses."""
    found: list[tuple[list[str], list[str]]] = [([], [])]  # labels and instructions
    for line in code.splitlines():
        labels, instructions = found[-1]
        if label := _LABEL.match(line):
            if instructions:
                found.append(([label[1]], []))
            else:
                labels.append(label[1])
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
            if re.search(r"\b(BRA|BRX|EXIT|RET)\b", instruction[1]):
                found.append(([], []))
    found = [block for block in found if block[1]]
    place = {label: number for number, (labels, _) in enumerate(found) for label in labels}
    return [
        Block(_count(instructions), _following(instructions[-1], number, place, len(found)))
        for number, (_, instructions) in enumerate(found)
    ]


def _following(last: str, number: int, place: dict[str, int], end: int) -> tuple[int, ...]:
    conditional = last.startswith("@") or re.search(r"\bBRA(\.DIV\b|(\.\w+)*\s+!?U?P)", last)
    after: list[int] = []
    if re.search(r"\bBRA\b", last):
        target = _TARGET.search(last)
        after += [place[target[1]]] if target and target[1] in place else []
        after += [number + 1] if conditional else []
    elif not re.search(r"\b(EXIT|RET|BRX)\b", last) or conditional:
        after.append(number + 1)
    return tuple(each for each in after if each < end)


def _count(instructions: list[str]) -> Count:
    real = [each for each in instructions if not re.match(r"(@\S+\s+)?NOP\b", each)]
    single, wide = (
        [match for each in real if (match := pattern.search(each))] for pattern in (_PRODUCT, _GROUP_PRODUCT)
    )
    products = len(single) + sum(int(match[1]) // 8 for match in wide)
    return Count(products, sum(bool(_COPY.search(each)) for each in real), len(real) - len(single) - len(wide))


def others_per_product(code: str) -> float:
    """Of a loop's shortest pass that both copies what comes next and multiplies; 0 where there is none.

    A pass is a way from a loop's first block to the branch back that repeats no block: what runs in it only now and
    then (a maximum that rises, masks, tiles at an edge) is not on the shortest one. Of several loops the best counts:
    inner ones, and those for tokens that are copied as they are.
    """
    flow = blocks(code)
    ratios = []
    for last, block in enumerate(flow):
        for first in (each for each in block.following if each <= last):
            usual = [
                (others, products)
                for (products, copies), others in _passes(flow, first, last).items()
                if products and copies
            ]
            if usual:
                others, products = min(usual)
                ratios.append(others / products)
    return round(min(ratios, default=0.0), 2)


def _passes(flow: list[Block], first: int, last: int) -> dict[tuple[int, int], int]:
    """Of the ways from `first` to `last`, by their numbers of products and copies, the least number of others."""
    ways: dict[int, dict[tuple[int, int], int]] = {}
    for number in range(last, first - 1, -1):
        products, copies, others = flow[number].count
        after = [ways[each] for each in flow[number].following if number < each <= last]
        onward = [way for each in after for way in each.items()] if number != last else [((0, 0), 0)]
        ways[number] = {}
        for (more_products, more_copies), more in onward:
            kind = products + more_products, copies + more_copies
            ways[number][kind] = min(ways[number].get(kind, others + more), others + more)
    return ways[first]
