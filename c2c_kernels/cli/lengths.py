"""Whether what is to be read fits the models' contexts; looked at before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from c2c_kernels.cli.errors import CommandError

if TYPE_CHECKING:
    from c2c_kernels.cli.prompts import PromptParts
    from c2c_kernels.evaluate import Reader


def check_asked(
    reader: Reader, what: str, text: str, prompts: Sequence[PromptParts], new_tokens: int, before: int = 0
) -> None:
    """CommandError where `text` called `what`, with a prompt around it and an answer after it, is too long for a model.

    `before`: tokens that the receiver has read already.
    """
    check_read(reader, what, text)
    read = len(reader.receiver_tokenizer(text, add_special_tokens=False).input_ids)
    longest = max(len(prompt.head) + len(prompt.rest) for prompt in prompts) + new_tokens
    check_fits("receiver", reader.receiver, f"{what}, question and answer", before + read + longest)


def check_read(reader: Reader, what: str, text: str) -> None:
    """CommandError where `text` is too long for the sharer."""
    check_fits("sharer", reader.sharer, what, len(reader.sharer_tokenizer(text).input_ids))


def check_fits(role: str, model: Any, what: str, tokens: int) -> None:
    """CommandError where so many tokens are more than the model's context holds."""
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and tokens > room:
        raise CommandError(f"{what}: {tokens} tokens; the {role}'s context holds {room}: a shorter text is wanted")
