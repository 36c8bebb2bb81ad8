"""What two models of different kinds are shown: documents, and questions of both kinds about them.

`gist` questions ask what a text is about, `fact` questions for a name, a number or a thing that stands in it. A model
without a chat template is not asked: it goes on from a `cloze`, the beginning of a sentence that ends in the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING

from c2c_kernels.cli import documents
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.prompts import PromptParts, split_prompt
from c2c_kernels.corpus import is_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        question: for models that answer.
        cloze: for models that go on; empty: they get the question.
        kind: "gist" or "fact"; empty for a question of the user's.
        wanted: an answer with one of these in it is right; empty where it is not known.
    """

    question: str
    cloze: str = ""
    kind: str = ""
    wanted: tuple[str, ...] = ()

    def right(self, written: str) -> bool | None:
        """Whether `written` answers it; None where that is not known."""
        return any(is_right(written, answer) for answer in self.wanted) if self.wanted else None


ABOUT_ANY_TEXT = Asked(documents.QUESTION_FOR_ANY_TEXT, "The text above is about", "gist")


@dataclass(frozen=True)
class AskedDocument:
    """A text and what is asked about it."""

    name: str
    text: str
    questions: tuple[Asked, ...]


def packaged() -> list[AskedDocument]:
    """The documents in the package, none of which any model or fit has read."""
    stored = json.loads((resources.files("c2c_kernels") / "data" / "exchange.json").read_text(encoding="utf-8"))
    return [
        AskedDocument(
            record["name"],
            record["text"],
            tuple(Asked(q["question"], q["cloze"], q["kind"], tuple(q["wanted"])) for q in record["questions"]),
        )
        for record in stored
    ]


def choose(paths: Sequence[str] | None, asked: Sequence[str] | None, count: int) -> list[AskedDocument]:
    """The `count` documents that are read, and another one for the mismatched cache.

    Args:
        paths: files, or None for documents of the package.
        asked: questions instead of those that go with the documents.
        count: how many are read.

    Raises:
        CommandError: for another number of files, and for files that are missing, empty or no text.
    """
    ready = packaged()
    if paths is None:
        read, others = ready[:count], ready[count:]
    else:
        if len(paths) != count:
            wanted = "one document" if count == 1 else f"{count} documents, one for each model"
            raise CommandError(f"--document was given {len(paths)} times: {wanted} or none is wanted")
        found = documents.read_documents(paths)
        read = [AskedDocument(document.name, document.text, (ABOUT_ANY_TEXT,)) for document in found]
        others = [document for document in ready if document.text not in {d.text for d in found}]
    if asked is not None:
        questions = tuple(Asked(" ".join(question.split())) for question in asked)
        read = [replace(document, questions=questions) for document in read]
    return [*read, others[0]]


def parts(tokenizer: PreTrainedTokenizerBase, text: str, asked: Asked) -> PromptParts:
    """The prompt that asks about `text`: what suits the model, a question in its chat template or a cloze.

    Raises:
        CommandError: where the text's tokens depend on the chat template around it.
    """
    if tokenizer.chat_template or not asked.cloze:
        return split_prompt(tokenizer, text, asked.question)
    head = list(tokenizer("").input_ids)  # the start token, where there is one
    rest = list(tokenizer(f"\n\n{asked.cloze}", add_special_tokens=False).input_ids)
    return PromptParts(head, rest, list(tokenizer(asked.cloze).input_ids))


def shown(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> str:
    """The question as the model gets it."""
    return asked.question if tokenizer.chat_template or not asked.cloze else f"{asked.cloze} ..."
