"""Whether a projector has seen what it is to be evaluated on, in its fit or in training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from c2c_kernels.corpus import Document
from c2c_kernels.projectors import CacheProjector

_DIGITS = 16  # of the SHA-256s that a fit records


def check_unseen(projector: CacheProjector, documents: Sequence[Document]) -> None:
    """ValueError where the projector was fitted or trained on one of the documents, or its file does not say."""
    seen = projector.facts.get("corpus", {}).get("texts")
    if not isinstance(seen, list):
        raise ValueError(
            "the projector does not say which texts it was fitted on (facts of an older version): fit it again"
        )
    known = {*seen, *projector.facts.get("training", {}).get("texts", ())}
    found = [d.name for d in documents if hashlib.sha256(d.text.encode()).hexdigest()[:_DIGITS] in known]
    if found:
        raise ValueError(
            f"{len(found)} of {len(documents)} documents are among those that the projector was fitted or trained on "
            f"({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}): held-out documents are wanted"
        )
