"""Fast tokenizers over the alphabet that cut the same text in different places."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LETTERS = "abcdefghij klmnop.\n"


def build_tokenizer(merges: int, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A BPE of single characters and the first `merges` pairs of letters, fewer than 100 ids in all."""
    vocabulary = {"<s>": 0, "<b>": 1, **{letter: 2 + at for at, letter in enumerate(_LETTERS)}}
    pairs = [(a, b) for a in "abcde" for b in "fghij"][:merges]
    vocabulary |= {a + b: len(vocabulary) + at for at, (a, b) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<b>")
    if bos:
        from tokenizers.processors import TemplateProcessing

        fast.backend_tokenizer.post_processor = TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 1)])
    return fast


def random_texts(count: int, length: int, seed: int = 0) -> list[str]:
    """Texts of random letters."""
    draw = random.Random(seed)
    return ["".join(draw.choice(_LETTERS) for _ in range(length)) for _ in range(count)]
