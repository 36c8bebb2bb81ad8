"""What the reference implementation computed: `shared/fixtures/rosetta`; where it is missing, tests are skipped."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from shared_folder import shared_folder

FOLDER = shared_folder("fixtures/rosetta") or Path("shared/fixtures/rosetta")
needs_fixtures = pytest.mark.skipif(not FOLDER.is_dir(), reason="shared/fixtures/rosetta is missing")
PROJECTORS = (
    [f"c2c_{kind}_float32_k+1v+1" for kind in ("mha_to_gqa_L3", "1head_to_2_L3", "same_L3", "same_L4", "gqa_to_mqa_L3")]
    + ["c2c_mha_to_gqa_L3_float32_k+1v-1", "c2c_mha_to_gqa_L3_float32_k-1v-1"]
    + [
        f"c2c_{kind}_{dtype}_k+1v+1"
        for kind in ("mha_to_gqa_L3", "1head_to_2_L3", "same_L3", "same_L4", "gqa_to_mqa_L3")
        for dtype in ("bfloat16", "float16")
    ]
)


@functools.cache
def cases(file: str) -> dict[str, dict]:
    return {case["name"]: case for case in torch.load(FOLDER / file, weights_only=True)["cases"]}


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32):
    """One of the tiny models."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    classes = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }
    stored = torch.load(FOLDER / "models.pt", weights_only=True)["models"][name]
    config_class, model_class = classes[stored["arch"]]
    made = model_class(config_class(**stored["config"]))
    made.load_state_dict({key: value.float() for key, value in stored["state"].items()})
    return made.to(dtype).eval()
