"""Alignment between the tokenizers of SmolLM2 (bytes) and Gemma 3 (characters, bytes where it has no piece)."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_alignment import assert_aligned, assert_partition
from transformers import AutoTokenizer

from c2c_kernels.alignment import NO_TEXT, token_spans
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.models import resolve

_LETTERS = [
    "e\u0301",
    "a\u0323\u0302",
    "\ufdfa",
    "\ufb01",
    "\u212b",
    "日本語",
    "한국어",
    "हिन्दी",
    "\U00012345",
    "\ufdd0",
    "▁",
    "Ġ",
]
_EMOJI = ["😀", "👩\u200d👩\u200d👧", "🇩🇪"]
_BLANKS = [" ", "  ", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u2028", "\x00"]
_WORDS = ["<bos>", "<|im_start|>", "<unused7>", "Bartholomew", "1987", "'ll", "don't", "x"]
_PIECES = st.one_of(st.text(max_size=6), st.sampled_from([*_LETTERS, *_EMOJI, *_BLANKS, *_WORDS]))
TEXTS = st.lists(_PIECES, max_size=12).map("".join)
MODELS = ("gemma3-270m", "smollm2-135m")


@pytest.fixture(scope="module")
def tokenizers():
    try:
        return [AutoTokenizer.from_pretrained(resolve(name).path) for name in MODELS]
    except CommandError as error:
        pytest.skip(f"the tokenizers cannot be had: {error}")


@pytest.mark.slow
@given(TEXTS)
@example("")
@example(" ")
@example("\U00012345\U00012345 ﷺ 👩‍👩‍👧")
@example("naïve e\u0301 \u2028x")
def test_any_text(tokenizers, text):
    both = [token_spans(tokenizer, text) for tokenizer in tokenizers]
    for found, tokenizer in zip(both, tokenizers, strict=True):
        assert_partition(found)
        assert list(found.ids) == tokenizer(text).input_ids
    assert_aligned(*both)
    assert_aligned(*reversed(both))


@pytest.mark.slow
@given(st.text(max_size=20), TEXTS.filter(bool))
def test_in_a_chat_template(tokenizers, question, text):
    """The text's characters are found in the template, whichever tokens they merge into."""
    gemma, smollm2 = tokenizers
    message = [{"role": "user", "content": f"{text}\n{question}"}]
    rendered = smollm2.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    at = rendered.rindex(text + "\n")
    inside = token_spans(smollm2, rendered, add_special_tokens=False).within(at, at + len(text))
    assert_partition(inside)
    assert inside.group[0] == NO_TEXT  # <|im_start|> of the template
    assert_aligned(token_spans(gemma, text), inside)


@pytest.mark.slow
def test_bytes_of_a_character(tokenizers):
    """Four bytes on both sides: all of SmolLM2's read what Gemma knows after the last."""
    gemma, smollm2 = (token_spans(tokenizer, "x\U00012345y") for tokenizer in tokenizers)
    assert [gemma.group.count(g) for g in range(3)] == [1, 4, 1]
    assert [smollm2.group.count(g) for g in range(3)] == [1, 4, 1]
    from c2c_kernels.alignment import align

    assert align(gemma, smollm2).index("last").tolist() == [1, 5, 5, 5, 5, 6]
    assert align(gemma, smollm2).index("first").tolist() == [1, 2, 2, 2, 2, 6]
