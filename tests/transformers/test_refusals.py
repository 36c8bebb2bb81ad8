"""What cannot be served is refused with an error that says why."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from tiny_models import PREFIX, build, build_small, read, tokens
from torch import nn

import c2c_kernels as c2c
from c2c_kernels.integrations.transformers import SharedContext, disable, enable, record_mass, session

PREFIX_IDS, QUESTION_IDS = tokens(1, PREFIX, seed=1), tokens(2, 7, seed=2)
SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MODELS = {
    "T5ForConditionalGeneration": (
        {"vocab_size": 32, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 32, "d_kv": 8},
        "encoder-decoder",
    ),
    "BertModel": ({**SMALL, "intermediate_size": 32}, "not causal"),
    "BloomForCausalLM": ({"vocab_size": 32, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "AttentionInterface"),
    "MambaForCausalLM": ({"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2}, "AttentionInterface"),
    "Llama4ForCausalLM": (
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "intermediate_size_mlp": 32},
        "chunked_attention",
    ),
    "Gemma3ForConditionalGeneration": (
        {
            "text_config": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
        "enable the language model inside",
    ),
}


@pytest.fixture
def model():
    return enable(build("llama"), backend="reference")


@pytest.fixture
def context():
    return SharedContext.from_caches(read(build("llama"), PREFIX_IDS))


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    settings, reason = MODELS[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=reason):
        enable(model)
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks


def test_bidirectional_gemma():
    with pytest.raises(ValueError, match="not causal"):
        enable(build("gemma3", use_bidirectional_attention=True))


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (nn.DataParallel, "DistributedDataParallel"),
        (torch.compile, "enable the model inside it"),
        (lambda model: model.config, "load it first"),
    ],
)
def test_what_is_no_pretrained_model(wrap, reason):
    with pytest.raises(TypeError, match=reason):
        enable(wrap(build("llama")))


def test_models_that_are_not_enabled(context):
    for manager in (lambda m: session(m, context), record_mass):
        with pytest.raises(ValueError, match="call enable"), manager(build("llama")):
            pass


def test_disable_inside_a_session(model, context):
    with session(model, context), pytest.raises(RuntimeError, match="leave the session first"):
        disable(model)


def refused(model, error, reason, **kwargs):
    with pytest.raises(error, match=reason), torch.no_grad():
        model(QUESTION_IDS, **kwargs)


def test_data_parallel_replicas(model, context):
    replica = model._replicate_for_data_parallel()
    refused(replica, RuntimeError, "DataParallel", c2c=context)


def test_packed_sequences(model, context):
    lengths = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    refused(model, ValueError, "cu_seq_lens", cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    refused(model, ValueError, "packed sequences", position_ids=packed, c2c=context)
    refused(model, ValueError, "packed sequences", position_ids=packed, c2c=context, use_cache=False)


def test_continuous_batching(model, context):
    refused(model, ValueError, "continuous batching", cache=object())
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)


def test_attention_dropout(context):
    model = enable(build("llama", attention_dropout=0.1))
    assert model(QUESTION_IDS, c2c=context).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"attention dropout \(0.1\)"):
        model.train()(QUESTION_IDS)


LAYERS = {**SMALL, "vocab_size": 101, "num_key_value_heads": 2, "intermediate_size": 32}


def of_kind(name, **settings):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**LAYERS, **settings)).eval()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NemotronForCausalLM", r"did not reach the attention of layers \[0, 1\]: NemotronForCausalLM"),
        ("DiffLlamaForCausalLM", r"attention of layers \[0, 1\] ran more than once: DiffLlamaForCausalLM"),
    ],
)
def test_layers_that_do_not_read_the_context_once(name, reason):
    model = of_kind(name)
    shared = SharedContext.from_caches(read(model, PREFIX_IDS))
    before = model(QUESTION_IDS).logits
    enable(model, backend="reference")
    torch.testing.assert_close(model(QUESTION_IDS).logits, before, rtol=1e-4, atol=1e-5)
    with record_mass(model):
        refused(model, RuntimeError, reason)
    if name.startswith("Nemotron"):
        refused(model, RuntimeError, reason, c2c=shared)
        with session(model, shared):
            refused(model, RuntimeError, r"do not hand \*\*kwargs on")


def test_one_layer_that_loses_the_context(model, context):
    """Layers without a segment count too."""
    layer = model.model.layers[2]
    kept = layer.forward
    layer.forward = lambda *args, c2c, **kwargs: kept(*args, **kwargs)
    sparse = SharedContext([context.layers[0], [], [], []])
    refused(model, RuntimeError, r"attention of layers \[2\]", c2c=sparse)
    layer.forward = kept
    assert model(QUESTION_IDS, c2c=sparse).logits.isfinite().all()


def test_caches_that_do_not_hold_what_attention_reads():
    model = of_kind("JetMoeForCausalLM", kv_channels=8, num_local_experts=2, num_experts_per_tok=2)
    shared = SharedContext.from_caches(read(model, PREFIX_IDS))
    refused(enable(model), ValueError, "such a cache does not hold the keys that attention reads", c2c=shared)


def test_masks_shorter_than_the_text(model, context):
    refused(model, ValueError, "cover the 0 tokens .* 7 new ones, got 5", attention_mask=torch.ones(2, 5), c2c=context)


def test_data_parallel_threads_inside_a_session(model, context):
    replica = model._replicate_for_data_parallel()
    errors = []

    def run():
        try:
            replica(QUESTION_IDS)
        except RuntimeError as error:
            errors.append(str(error))

    with session(model, context):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert "DataParallel" in errors[0]


def test_bidirectional_calls(model):
    refused(model, ValueError, "not causal", is_causal=False)


def test_position_ids_of_the_wrong_shape(model, context):
    refused(
        model, ValueError, r"position_ids must be .* \(2, 7\), got \(2, 5\)", position_ids=torch.ones(2, 5), c2c=context
    )
    refused(model, ValueError, "position_ids", position_ids=torch.ones(3, 2, 7), c2c=context)


def test_what_is_no_context(model):
    refused(model, TypeError, "c2c must be a SharedContext, got dict", c2c={})
    with pytest.raises(TypeError, match="context must be a SharedContext, got list"), session(model, []):
        pass


def test_contexts_that_do_not_fit(model):
    deep = SharedContext.from_caches(read(build_small("llama"), PREFIX_IDS))
    refused(model, ValueError, "made for 2 layers, the model has 4", c2c=deep)
    three = SharedContext.from_caches(read(build("llama"), tokens(3, 5, seed=3)))
    refused(model, ValueError, "2 rows does not divide by the context's 3 rows", c2c=three)

    cache = read(build("llama"), PREFIX_IDS)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    key, value = layers[2]
    for changed, reason in (
        ((key[:, :1], value[:, :1]), "layer 2: kv_heads 2 in the layer, 1 in the context"),
        ((key[..., :8], value), "layer 2: head_dim 16 in the layer, 8 in the context"),
        ((key, value[..., :8]), "layer 2: value_dim 16 in the layer, 8 in the context"),
    ):
        layers[2] = changed
        refused(model, ValueError, reason, c2c=SharedContext.from_caches(layers, positions=False))
    elsewhere = SharedContext([[c2c.SharerSegment(k.to("meta"), v.to("meta"))] for k, v in layers])
    refused(model, ValueError, "layer 0: device cpu in the layer, meta in the context", c2c=elsewhere)
