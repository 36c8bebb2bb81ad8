"""What is trained on, whatever is trained: texts and questions, which are held out, how long they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from c2c_kernels.fitting.texts import text_hashes
from c2c_kernels.training.examples import Asked, Questions, Repeats, Stream, Texts
from c2c_kernels.training.options import TrainOptions

# Of the documents, or texts with questions, at most one in so many is held out.
_HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Examples:
    """What is trained on.

    Attributes:
        texts: documents; each window continues in several places.
        questions: about texts; the answers are scored.
    """

    texts: Sequence[str] = ()
    questions: Sequence[Asked] = ()

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of every text that is read, once each, in order."""
        return list(dict.fromkeys(text_hashes([*self.texts, *(one.context for one in self.questions)])))


def check_lengths(
    options: TrainOptions,
    examples: Examples,
    prefix: Sequence[int],
    sharer: Any,
    receiver: Any,
    sharer_tokenizer: Any,
    receiver_tokenizer: Any,
) -> None:
    """ValueError for what is longer than a model's context, or empty."""
    if not examples.texts and not examples.questions:
        raise ValueError("examples are empty: texts or questions to train on are wanted")
    for number, text in enumerate(examples.texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"texts[{number}] is empty: a document is wanted")
    limits = [
        (name, int(longest), tokenizer)
        for name, model, tokenizer in (("sharer", sharer, sharer_tokenizer), ("receiver", receiver, receiver_tokenizer))
        if (longest := getattr(model.config, "max_position_embeddings", None)) is not None
    ]
    # What is said again stands after the whole window, continuation included.
    own = len(prefix) + options.continuation * (3 if options.repeat_weight else 1)
    for name, longest, _ in limits:
        # another tokenizer may need more tokens for the same text
        if examples.texts and 2 * options.context + own > longest:
            raise ValueError(
                f"context is {options.context} tokens, the {name}'s own {longest} with a continuation of "
                f"{options.continuation}: at most {max((longest - own) // 2, 0)} is wanted"
            )
    asked: dict[str, tuple[int, int]] = {}  # per text the first question, and most tokens around it
    for number, one in enumerate(examples.questions):
        if not one.context.strip() or not one.rest or not one.answer:
            raise ValueError(f"questions[{number}] has an empty context, prompt or answer")
        first, around = asked.get(one.context, (number, 0))
        asked[one.context] = (first, max(around, len(one.head) + len(one.rest) + len(one.answer)))
    for context, (number, around) in asked.items():
        for name, longest, tokenizer in limits:
            count = len(tokenizer(context)["input_ids"]) + (around if name == "receiver" else 0)
            if count > longest:
                raise ValueError(
                    f"questions[{number}] takes {count} tokens of the {name}, whose context is {longest} tokens long"
                )


def held_out(examples: Examples, options: TrainOptions) -> tuple[Examples, Examples]:
    """Examples to train on and to look at: texts with the smallest hashes are kept from training."""

    def split(texts: list[str]) -> set[str]:
        hashes = dict(zip(text_hashes(texts), texts, strict=True))
        count = min(options.held_out, len(hashes) // _HELD_OUT_SHARE) if options.validations else 0
        return {hashes[digest] for digest in sorted(hashes)[:count]}

    texts = split(list(examples.texts))
    contexts = split(list(dict.fromkeys(one.context for one in examples.questions)))
    parts = [
        Examples(
            [text for text in examples.texts if (text in texts) == kept],
            [one for one in examples.questions if (one.context in contexts) == kept],
        )
        for kept in (False, True)
    ]
    return parts[0], parts[1]


def streams(
    examples: Examples, prefix: Sequence[int], tokenizers: tuple[Any, Any], options: TrainOptions
) -> list[Stream]:
    found: list[Stream] = []
    if examples.texts:
        texts = Texts(examples.texts, *tokenizers, prefix, options)
        found += [texts, Repeats(texts)] if options.repeat_weight else [texts]
    if examples.questions:
        found.append(Questions(examples.questions, *tokenizers, options))
    return found
