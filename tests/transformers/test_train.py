"""Training a projector on tiny models: it learns, goes on to the same bits, and refuses what cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_projected import random_projector
from tiny_models import build
from tiny_tokenizers import build_tokenizer, random_texts

from c2c_kernels.training import Asked, Examples, TrainOptions, train_projector

TEXTS = random_texts(12, 150)
OPTIONS = TrainOptions(
    steps=4, context=40, least_context=8, continuation=12, accumulate=1, held_out=0, lr=3e-3, distill=0.5
)
SHARER_TOKENIZER, TOKENIZER = build_tokenizer(25, bos=True), build_tokenizer(4)
QUESTIONS = [
    Asked(text[:40], (1, 5), (3 + n, 4, 5), (7 + n, 9)) for text in random_texts(6, 60, seed=3) for n in range(2)
]


@pytest.fixture(scope="module")
def models():
    return build("gemma3"), build("llama")


def projector_of(models, **settings):
    return random_projector(*models, prefix=(1,), **settings)


def train(models, projector=None, examples=Examples(TEXTS, QUESTIONS), options=OPTIONS, **keywords):
    projector = projector_of(models) if projector is None else projector
    return train_projector(
        *models,
        projector,
        examples,
        sharer_tokenizer=SHARER_TOKENIZER,
        receiver_tokenizer=TOKENIZER,
        options=options,
        **keywords,
    )


def test_runs(models):
    seen = []
    trained = train(models, update=seen.append, options=replace(OPTIONS, held_out=1, steps=20))
