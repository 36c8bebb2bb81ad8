"""Files of fortunes: short texts with a line `%` between them, put together to documents."""

from __future__ import annotations

import re

# Characters of a document: about 1,000 tokens, so that a part of it can be the context of the rest.
_SIZE = 4000


def to_texts(content: str) -> list[str]:
    """Neighbouring fortunes, whole ones, up to the first that ends past 4,000 characters, with blank lines between.

    The last document may be shorter. Overstrikes (a letter, a backspace, a letter) become the last letter; bells go.
    """
    fortunes = [
        re.sub(r".\x08|[\x07\x08]", "", part).expandtabs(4).strip("\n") for part in re.split(r"(?m)^%.*\n?", content)
    ]
    texts: list[list[str]] = [[]]
    size = 0
    for fortune in fortunes:
        if not fortune.strip():
            continue
        if size >= _SIZE:
            texts.append([])
            size = 0
        texts[-1].append(fortune.rstrip())
        size += len(fortune)
    return ["\n\n".join(part) for part in texts if part]
