"""Loss per token of the continuation, in five arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from c2c_kernels.evaluate.arms import ARMS, Projections, Reader
from c2c_kernels.evaluate.pieces import Piece
from c2c_kernels.evaluate.results import LossResult
from c2c_kernels.integrations.transformers.continuation import continuation_loss


@torch.inference_mode()
def score(
    reader: Reader,
    pieces: Sequence[Piece],
    *,
    name: str = "",
    seed: int = 0,
    update: Callable[[int], None] = lambda done: None,
) -> LossResult:
    """The loss of every piece in every arm: the context is read once, the continuation scored in one forward pass.

    The first token of a continuation is given in all arms, the others are scored; so every arm scores the same tokens,
    whether or not something came before.

    Args:
        pieces: of at least two documents; those of a document follow one another.
        name: of the kind of text, for the result.
        seed: of the noise.
        update: called with how many pieces are done.

    Raises:
        ValueError: for pieces of one document alone, which leave no mismatched cache.
    """
    names = list(dict.fromkeys(piece.document for piece in pieces))
    if len(names) < 2:
        raise ValueError(f"pieces are of {len(names)} documents, at least 2 are wanted: another one is the mismatched")
    head = reader.projector.prefix
    projections = Projections(reader, [piece.context for piece in pieces], head)
    alone = reader.read(head) if head else None
    generator = torch.Generator().manual_seed(seed)
    losses = torch.zeros(len(ARMS), len(names), dtype=torch.float64)
    tokens = torch.zeros(len(names), dtype=torch.float64)
    # The document before, in a circle: its last cache is the mismatched one.
    other = projections.last
    previous, document = other, pieces[0].document
    for at, piece in enumerate(pieces):
        if piece.document != document:
            other, document = previous, piece.document
        projected = projections.take(at)
        contexts = {
            "alone": alone,
            "text": reader.read([*head, *piece.context_ids]),
            "projected": projected,
            "mismatched": other,
            "noise": projections.statistics.noise(projected, generator),
        }
        column = names.index(document)
        for row, arm in enumerate(ARMS):
            losses[row, column] += continuation_loss(reader.receiver, contexts[arm], piece.continuation_ids)
        tokens[column] += len(piece.continuation_ids) - 1
        previous = projected
        update(at + 1)
    return LossResult(name, tuple(names), losses, tokens, len(pieces))
