"""Windows as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2c_kernels.projectors import CacheProjector, TokenPlan
from c2c_kernels.training.examples import Window

NOT_SCORED = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Some windows and all their rows.

    Attributes:
        sharer_ids: (windows, sharer tokens), padded on the right.
        plan: batched, of all windows; see `CacheProjector.plan`.
        head_ids: (windows, most head tokens), padded on the right.
        head_lengths: (windows,).
        text_ids: (windows, most head and text tokens): what the receiver would read itself, padded on the right.
        window: (rows,) which window a row belongs to, in order.
        visible: (rows,) segment tokens of its window that a row sees.
        offset: (rows,) position of a row's first own token: head and text tokens before it.
        own_ids: (rows, most own tokens), padded on the right.
        targets: (rows, most own tokens): the token after each own one where it is scored, else NOT_SCORED.
        inside: whether the rows' own tokens are those of `text_ids` from `offset` on.
    """

    sharer_ids: Tensor
    plan: TokenPlan
    head_ids: Tensor
    head_lengths: Tensor
    text_ids: Tensor
    window: Tensor
    visible: Tensor
    offset: Tensor
    own_ids: Tensor
    targets: Tensor
    inside: bool

    @property
    def scored(self) -> int:
        """How many tokens are."""
        return int((self.targets != NOT_SCORED).sum())


def collate(windows: Sequence[Window], projector: CacheProjector) -> Batch:
    """The windows, all of one kind, as one batch."""
    plans = [projector.plan(w.sharer, w.receiver, start=len(w.head)) for w in windows]
    lengths = torch.tensor([len(plan.index) for plan in plans])
    index, positions = (pad([getattr(plan, name) for plan in plans]) for name in ("index", "positions"))
    ends = torch.tensor([int(plan.end) for plan in plans])
    rows = [(number, row) for number, w in enumerate(windows) for row in w.rows]
    offsets = [len(windows[number].head) + row.start for number, row in rows]
    visible = [int((plans[number].positions < offset).sum()) for (number, _), offset in zip(rows, offsets, strict=True)]
    own, targets = [], []
    for _, row in rows:
        ids = torch.tensor(row.ids)
        own.append(ids[:-1])
        wanted = ids[1:].clone()
        wanted[: row.first - 1] = NOT_SCORED
        targets.append(wanted)
    return Batch(
        sharer_ids=pad([torch.tensor(w.sharer.ids) for w in windows]),
        plan=TokenPlan(index, positions, ends, None if len(set(lengths.tolist())) == 1 else lengths),
        head_ids=pad([torch.tensor(w.head, dtype=torch.long) for w in windows]),
        head_lengths=torch.tensor([len(w.head) for w in windows]),
        text_ids=pad([torch.tensor([*w.head, *w.receiver.ids]) for w in windows]),
        window=torch.tensor([number for number, _ in rows]),
        visible=torch.tensor(visible),
        offset=torch.tensor(offsets),
        own_ids=pad(own),
        targets=pad(targets, NOT_SCORED),
        inside=all(row.inside for _, row in rows),
    )


def pad(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    """(rows, longest) with `value` on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
