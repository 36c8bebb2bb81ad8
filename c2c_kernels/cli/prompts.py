"""The token sequences of the three ways to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from c2c_kernels.cli.errors import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A small model answers best in this form: the text, then the question, then how long an answer is wanted.
_QUESTION = "Question: {question} Answer in one short sentence."


@dataclass(frozen=True)
class Prompt:
    """Token ids. `prefix + rest` is the prompt with the text in it; the cache stands for `prefix`.

    Attributes:
        prefix: the chat template's head and the text, as far as no question shows.
        rest: the question and the chat template's tail.
        bare: the prompt of the question alone.
    """

    prefix: list[int]
    rest: list[int]
    bare: list[int]


def build_prompt(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> Prompt:
    """The prompt that asks `question` about `text`."""
    asked = _QUESTION.format(question=question)
    content = f"{text}\n\n{asked}"
    whole, alone = _render(tokenizer, content), _render(tokenizer, asked)
    # Text and question together: the text on its own may occur in the template's head too.
    head, found, tail = whole.rpartition(content)
    # Around the content the template must write what it writes around the question alone, nothing of the text.
    if not found or alone != head + asked + tail:
        raise CommandError("the receiver's chat template does not hand the text through once and as it is")
    cut = len(head) + len(text)
    return Prompt(
        prefix=_encode(tokenizer, whole[:cut]),
        rest=tokenizer(whole[cut:], add_special_tokens=False).input_ids,
        bare=_encode(tokenizer, alone),
    )


@dataclass(frozen=True)
class PromptParts:
    """Token ids of a prompt around its text: `head`, the text's own tokens, `rest`; `bare` is the question alone."""

    head: list[int]
    rest: list[int]
    bare: list[int]


def split_prompt(tokenizer: PreTrainedTokenizerBase, text: str, question: str) -> PromptParts:
    """The prompt of `build_prompt` in parts, so that a text that another model has read can take the text's place.

    Raises:
        CommandError: where the text's tokens depend on the chat template around it.
    """
    prompt = build_prompt(tokenizer, text, question)
    tokens = list(tokenizer(text, add_special_tokens=False).input_ids)
    head = prompt.prefix[: len(prompt.prefix) - len(tokens)]
    if head + tokens != prompt.prefix:
        raise CommandError("the receiver's tokenizer joins the text with the chat template before it: not supported")
    return PromptParts(head, prompt.rest, prompt.bare)


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """What the receiver is to write after a prompt: the answer and the token that ends it."""
    if not tokenizer.chat_template:
        end = tokenizer.eos_token_id
        return [*_plain(tokenizer, f" {answer}"), *([] if end is None else [end])]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    _, found, tail = whole.rpartition(answer)
    end = _plain(tokenizer, tail)[:1] if found and tail else [tokenizer.eos_token_id]
    return [*_plain(tokenizer, answer), *(token for token in end if token is not None)]


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _render(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    if not tokenizer.chat_template:
        return f"{content}\nAnswer:"
    message = {"role": "user", "content": content}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # A chat template writes the start token itself.
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids)
