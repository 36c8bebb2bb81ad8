"""C2CModel: generation over fused caches, against what the reference implementation generated."""

from __future__ import annotations

import warnings

import pytest
import torch
from error_rule import assert_as_exact
from rosetta_fixtures import FOLDER, cases, model, needs_fixtures

from c2c_kernels.integrations.rosetta import C2CModel, CheckpointError, load_checkpoint

GenerationConfig = pytest.importorskip("transformers").GenerationConfig
pytestmark = needs_fixtures
CASES = [
    "A_basic", "A_batch3", "A_bf16", "A_gate_closed", "A_off", "A_long_last", "AB_par_both", "AB_seq_both",
    "AB_par_only2", "AB_par_sections", "AB_seq_sections", "AB_par_bf16", "AB_per_model_ids", "Q_include_response",
]  # fmt: skip
AIO = ["AB_aio_par", "AB_aio_seq"]


def fused_model(case: dict, dtype: torch.dtype | None = None) -> C2CModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if case["ckpt"] == "ckpt_A_closed" else "error")
        fusers = load_checkpoint(FOLDER / case["ckpt"])
    dtype = dtype or case.get("dtype", torch.float32)
    for fuser in fusers.values():
        fuser.to(dtype)
    return C2CModel(
        model("recv", dtype), [model(name, dtype) for name in case["sharers"]], fusers,
        mode=case.get("mode", "parallel"), include_response=case.get("include_response", False),
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:every gate of the fuser")
def test_matches_the_reference_implementation(name, monkeypatch):
    case = cases("rosetta_model.pt")[name]
    ours = fused_model(case)
    ids = case["input_ids"]
    got = ours.prefill(ids, case["sections"])
    exact = fused_model(case, torch.float64).prefill(ids, case["sections"])
    fused = sum(length for length, _ in case["sections"][:-1])
    for layer, (key, value) in enumerate(case["fused"]):
        for slot, theirs in (("keys", key), ("values", value)):
            mine, oracle = (getattr(made.cache.layers[layer], slot)[:, :, :fused] for made in (got, exact))
            assert_as_exact(f"layer {layer} {slot}", mine, theirs[:, :, :fused], oracle)
    assert_as_exact("logits", got.logits, case["logits"], exact.logits)
    made = ours.generate(
        ids, case["sections"], max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(made.sequences, case["gen"])
    truth = fused_model(case, torch.float64).generate(
        ids, case["sections"], max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(truth.sequences, case["gen"])
    # Scores were made on another processor, whose products PyTorch rounds otherwise: its own here count as well.
    monkeypatch.setenv("C2C_BACKEND", "reference")
    torchs = fused_model(case).generate(
        ids, case["sections"], max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    stacked, here, oracle = (torch.stack(list(x.logits), 1) for x in (made, torchs, truth))
    assert_as_exact("scores", stacked.to(case["scores"].dtype), case["scores"], oracle, others=(here,))


def test_every_case_is_here():
    assert set(CASES) | set(AIO) == set(cases("rosetta_model.pt"))


@pytest.mark.parametrize("name", AIO)
def test_other_projectors_are_refused_by_name(name):
    with pytest.raises(CheckpointError, match=r"projector_0\.json is a projector of class AllInOneProjector"):
        load_checkpoint(FOLDER / cases("rosetta_model.pt")[name]["ckpt"])


def test_closed_gates_warn_and_change_nothing():
    case = cases("rosetta_model.pt")["A_gate_closed"]
    with pytest.warns(UserWarning, match="every gate of the fuser of .*ckpt_A_closed is closed"):
        load_checkpoint(FOLDER / case["ckpt"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = fused_model(case)
        got = ours.prefill(case["input_ids"], case["sections"])
    # The same sections, with nobody fused into them.
    plain = ours.prefill(case["input_ids"], [(length, -1) for length, _ in case["sections"]])
    assert torch.equal(got.logits, plain.logits)
    for mine, theirs in zip(got.cache.layers, plain.cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("name", ["A_basic", "AB_par_both", "AB_seq_both", "Q_include_response"])
def test_a_padded_row_is_the_row_alone(name):
    """On the left, to different lengths: same tokens, and logits within what a batch may change."""
    case = cases("rosetta_model.pt")[name]
    ours = fused_model(case)
    rows = [torch.randint(3, 96, (1, length)) for length in (11, 7, 4)]
    ids = torch.cat([torch.nn.functional.pad(row, (11 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (11 - row.shape[1], 0)) for row in rows])
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = ours.generate(ids, None, mask, **options)
    for number, row in enumerate(rows):
        alone = ours.generate(row, **options)
        assert torch.equal(together.sequences[number, 11:], alone.sequences[0, row.shape[1] :])
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[number], theirs[0], atol=2e-5, rtol=2e-5)
    # Padding is told from tokens: without the mask the short rows differ.
    blind = ours.generate(ids, **options)
    assert not torch.allclose(blind.logits[0][2], together.logits[0][2], atol=1e-2)


def test_beams_and_several_sequences():
    case = cases("rosetta_model.pt")["A_basic"]
    ours = fused_model(case)
    greedy = ours.generate(case["input_ids"], max_new_tokens=5, do_sample=False)
    beams = ours.generate(case["input_ids"], max_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=3)
    assert beams.shape == (3, 16) and len({tuple(row) for row in beams.tolist()}) == 3
    torch.manual_seed(0)
    sampled = ours.generate(case["input_ids"], max_new_tokens=5, do_sample=True, num_return_sequences=4)
    assert sampled.shape == (4, 16) and torch.equal(sampled[:, :11], case["input_ids"].expand(4, -1))
    assert torch.equal(ours.generate(case["input_ids"], max_new_tokens=5, do_sample=False), greedy)


@pytest.mark.parametrize("name", ["A_basic", "Q_include_response"])
def test_the_cache_is_used_whatever_configurations_say(name, monkeypatch):
    case = cases("rosetta_model.pt")[name]
    ours, ids = fused_model(case), case["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    given = GenerationConfig(**options, use_cache=False)
    assert torch.equal(ours.generate(ids, generation_config=given), case["gen"]) and given.use_cache is False
    monkeypatch.setattr(ours.receiver.generation_config, "use_cache", False)
    monkeypatch.setattr(ours.receiver.config, "use_cache", False)
    assert torch.equal(ours.generate(ids, **options), case["gen"])


@pytest.mark.parametrize("name", ["A_basic", "Q_include_response"])
def test_options_that_would_give_other_tokens_are_refused(name, monkeypatch):
    ours, ids = fused_model(cases("rosetta_model.pt")[name]), cases("rosetta_model.pt")[name]["input_ids"]
    drafts = "decoding from drafts does not go on from a cache"
    for options, match in (
        ({"use_cache": False}, "use_cache=False cannot be given: the fused cache is used"),
        ({"prompt_lookup_num_tokens": 3}, f"^prompt_lookup_num_tokens cannot be given: .*{drafts}"),
        ({"assistant_model": model("recv")}, f"^assistant_model cannot be given: .*{drafts}"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
         f"generation_config.prompt_lookup_num_tokens cannot be given: .*{drafts}"),
        ({"generation_config": GenerationConfig(cache_implementation="static")},
         "generation_config.cache_implementation cannot be given: the fused cache is used"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ours.generate(ids, max_new_tokens=4, **options)
    monkeypatch.setattr(ours.receiver.generation_config, "prompt_lookup_num_tokens", 3)
    with pytest.raises(ValueError, match=r"generation_config\.prompt_lookup_num_tokens cannot be given"):
        ours.generate(ids, max_new_tokens=4)


def test_what_does_not_fit_is_refused():
    fusers = load_checkpoint(FOLDER / "ckpt_A")
    recv, sharer, other = model("recv"), model("shA"), model("shB")
    with pytest.raises(ValueError, match=r"the sharer has 1 KV heads x 32, the fuser of .*ckpt_A is made for 5 x 8"):
        C2CModel(recv, [other], fusers)
    with pytest.raises(ValueError, match=r"fusers are for sharers \[1\], wanted some of 1..0"):
        C2CModel(recv, [], fusers)
    with pytest.raises(ValueError, match="include_response takes one sharer, got 2"):
        C2CModel(recv, [sharer, other], fusers, include_response=True)
    with pytest.raises(ValueError, match="mode must be one of parallel, sequential"):
        C2CModel(recv, [sharer], fusers, mode="both")
    ours = C2CModel(recv, [sharer], fusers)
    ids = torch.ones(1, 11, dtype=torch.long)
    with pytest.raises(ValueError, match=r"sections have lengths \[4, 1\], wanted positive, sum 11"):
        ours.prefill(ids, [(4, 1), (1, -1)])
    with pytest.raises(ValueError, match="sections name sharers 0b10, there are fusers for 0b1"):
        ours.prefill(ids, [(10, 2), (1, -1)])
    with pytest.raises(ValueError, match="input_ids has 1 entries"):
        ours.prefill([ids])
    with pytest.raises(ValueError, match="model 1 has input_ids"):
        ours.prefill([ids, ids[:, 1:]])
    with pytest.raises(ValueError, match="padding goes left"):
        ours.prefill(ids, None, torch.tensor([[1] * 10 + [0]]))
    with pytest.raises(ValueError, match="attention_mask of model 0 has values other than 0 and 1"):
        ours.prefill(ids, None, torch.full((1, 11), 2))
    with pytest.raises(ValueError, match="past_key_values cannot be given"):
        ours.generate(ids, past_key_values=object())
    with pytest.raises(ValueError, match="include_response takes one beam"):
        C2CModel(model("recv"), [model("shQ")], load_checkpoint(FOLDER / "ckpt_Q"), include_response=True).generate(
            ids, num_beams=2
        )
