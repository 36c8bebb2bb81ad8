"""Tiny random models of every family the patch serves, and their inputs."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

WINDOW = 8
PREFIX = 21  # more than two windows
VOCABULARY = 101

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # large, so that attention is far from uniform
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}

# family: (configuration class, model class, what differs from _COMMON; None leaves an entry out)
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_MIXED, "use_sliding_window": True, "head_dim": None}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_MIXED, "use_sliding_window": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 0], "head_dim": None}),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"sliding_window": WINDOW, "head_dim": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_MIXED, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_MIXED, "query_pre_attn_scalar": 16}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    ),
}

MIXTURES = ("gpt_oss", "qwen3_moe")


def build(
    family: str, *, seed: int = 0, attention: str = "eager", experts: str = "eager", **changes: object
) -> PreTrainedModel:
    """A tiny float32 model in eval mode that never ends a text; its weights depend on family, seed and changes."""
    config_class, model_class, differences = FAMILIES[family]
    settings = {**_COMMON, **differences, **changes}
    settings = {name: value for name, value in settings.items() if value is not None or name == "eos_token_id"}
    config = getattr(transformers, config_class)(**settings)
    config._attn_implementation = attention
    if family in MIXTURES:
        config._experts_implementation = experts
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def build_small(family: str, **changes: object) -> PreTrainedModel:
    """A model of the same family with two layers: an assistant, or a sharer that does not fit."""
    halved = {
        name: FAMILIES[family][2][name][:2] for name in ("layer_types", "no_rope_layers") if name in FAMILIES[family][2]
    }
    return build(family, num_hidden_layers=2, **halved, **changes)


def tokens(batch: int, length: int, seed: int) -> Tensor:
    """(batch, length) random token ids, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def read(model: PreTrainedModel, input_ids: Tensor, **kwargs: object) -> DynamicCache:
    """The cache of a model that has read input_ids."""
    cache = DynamicCache()
    model(input_ids, past_key_values=cache, **kwargs)
    return cache


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of token ids as a left-padded batch and its attention mask."""
    longest = max(len(row) for row in rows)
    batch = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return batch, mask


class Float64(TorchFunctionMode):
    """Runs a float64 model wholly in float64: Transformers casts norms and softmaxes to float32, here they stay."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)
