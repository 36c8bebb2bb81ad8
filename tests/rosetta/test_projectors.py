"""C2CProjector: what the reference implementation computed, its gradients, and a live model of it accelerated."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from error_rule import GRADIENT_ULPS, assert_as_exact
from rosetta_fixtures import PROJECTORS, cases, needs_fixtures
from rosetta_stand_in import AllInOneProjector, C2CProjector, RosettaModel

import c2c_kernels as c2c
from c2c_kernels.backends import reference_fuse
from c2c_kernels.fuser_layers import FuserLayer, FuserShape
from c2c_kernels.integrations.rosetta import CheckpointError, accelerate, restore
from c2c_kernels.integrations.rosetta.checkpoints import tensor_names

BACKENDS = [r.name for r in c2c.backends() if r.name in ("reference", "cpu")]


TRAINED = "c2c_mha_to_gqa_L3_float32_k+1v+1"  # the case with gradients


def shape_of(case: dict) -> FuserShape:
    arguments = case["init"]
    return FuserShape(
        arguments["source_num_heads"], arguments["source_dim"], arguments["source_dim"], arguments["target_num_heads"],
        arguments["target_dim"], arguments["target_dim"], arguments["hidden_dim"], arguments["intermediate_dim"],
        arguments["num_layers"],
    )  # fmt: skip


def layer_of(case: dict, dtype: torch.dtype | None = None) -> FuserLayer:
    shape = shape_of(case)
    layer = FuserLayer(shape, dropout=0.0)
    state = {ours: case["state"][theirs] for ours, theirs in tensor_names(shape)}
    assert len(state) + 1 == len(case["state"])  # and the temperature
    layer.load_state_dict(state, assign=True)
    return layer.to(dtype).eval() if dtype else layer.eval()


def live(case: dict) -> C2CProjector:
    projector = C2CProjector(**case["init"]).to(case["src"][0].dtype)
    projector.load_state_dict(case["state"])
    return projector.eval()


def exact_of(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        pairs = [[tensor.double() for tensor in case[side]] for side in ("tgt", "src")]
        return layer_of(case, torch.float64)(*pairs)


@needs_fixtures
def test_every_case_of_the_class_is_here():
    found = {name: case for name, case in cases("projectors.pt").items() if case["cls"] == "C2CProjector"}
    assert set(found) == set(PROJECTORS)
    assert [name for name, case in found.items() if case.get("train")] == [TRAINED]


@needs_fixtures
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROJECTORS)
def test_matches_the_reference_implementation(name, backend):
    """The error is at most twice the reference implementation's own, whose outputs are float32."""
    case = cases("projectors.pt")[name]
    model = accelerate(RosettaModel([live(case)]), backend=backend)
    with torch.no_grad():
        ours = model.projector_list[0](case["src"], case["tgt"])
    assert model.projector_list[0].own_calls == 0
    for slot, mine, theirs, exact in zip(("key", "value"), ours, case["out"], exact_of(case), strict=True):
        assert str(mine.dtype) == case["out_dtype"] == "torch.float32"
        assert_as_exact(slot, mine, theirs, exact)


@needs_fixtures
@pytest.mark.parametrize("name", PROJECTORS)
def test_weights_per_token_and_head(name):
    case = cases("projectors.pt")[name]
    weights, exact = layer_of(case).weights(), layer_of(case, torch.float64).weights()
    for slot, own, raw in zip(("key", "value"), case["tgt"], case["src"], strict=True):
        with torch.no_grad():
            ours = reference_fuse.token_weights(own, raw, getattr(weights, slot))
            oracle = reference_fuse.token_weights(own.double(), raw.double(), getattr(exact, slot))
        assert_as_exact(slot, ours, case[f"norm_{slot}_scalar"], oracle)


@needs_fixtures
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_gradients(backend):
    case = cases("projectors.pt")[TRAINED]
    train = case["train"]
    uniforms = (train["u1"].squeeze(-1), train["u2"].squeeze(-1))

    def run(dtype, backend):
        layer = layer_of(case, dtype).train()
        source, target = ([x.to(dtype).requires_grad_() for x in case[side]] for side in ("src", "tgt"))
        numbers = [u.to(dtype) for u in uniforms]
        made = layer(target, source, temperature=float(train["temperature"]), uniforms=numbers, backend=backend)
        cotangents = (train["cotangent"].to(dtype), train["cotangent"].flip(2).to(dtype))
        parameters = dict(layer.named_parameters())
        grads = torch.autograd.grad(made, [*source, *target, *parameters.values()], cotangents)
        return made, grads[:2], grads[2:4], dict(zip(parameters, grads[4:], strict=True))

    ours, exact = run(torch.float32, backend), run(torch.float64, "reference")
    theirs = (train["out"], train["grad_src"], train["grad_tgt"])
    for what, mine, torchs, oracle in zip(("out", "source", "target"), ours, theirs, exact, strict=False):
        for number in range(2):
            assert_as_exact(f"{what} {number}", mine[number], torchs[number], oracle[number].detach(), GRADIENT_ULPS)
    for mine_name, their_name in tensor_names(shape_of(case)):
        torchs = train["grad_params"][their_name]
        assert_as_exact(mine_name, ours[3][mine_name], torchs, exact[3][mine_name], GRADIENT_ULPS)


@needs_fixtures
def test_annealing_is_theirs():
    case = cases("projectors.pt")[TRAINED]
    got = c2c.C2CFuser(shape_of(case), {0: 0}).update_temperature(case["train"]["step"])
    assert got == pytest.approx(float(case["train"]["temperature"]), rel=1e-6)


CASE = {"source_dim": 8, "target_dim": 6, "source_num_heads": 3, "target_num_heads": 2, "hidden_dim": 16,
        "intermediate_dim": 24, "num_layers": 4}  # fmt: skip


def open_projector(**changes) -> C2CProjector:
    projector = C2CProjector(**{**CASE, **changes}).eval()
    with torch.no_grad():
        projector.key_gate_logit.fill_(1.0)
    return projector


def caches(length: int = 5):
    source = torch.randn(2, 3, length, 8), torch.randn(2, 3, length, 8)
    return source, (torch.randn(2, 2, length, 6), torch.randn(2, 2, length, 6))


def caches_of(seed: int):
    torch.manual_seed(seed)
    return caches()


class TestAccelerate:
    def test_restore_puts_back_what_was_there(self):
        model = RosettaModel([open_projector(), open_projector()])
        source, target = caches()
        wanted = [projector(source, target) for projector in model.projector_list]
        accelerate(accelerate(model))
        for projector, pair in zip(model.projector_list, wanted, strict=True):
            for mine, theirs in zip(projector(source, target), pair, strict=True):
                torch.testing.assert_close(mine, theirs)
            assert projector.own_calls == 1
        restore(restore(model))
        for projector in model.projector_list:
            projector(source, target)
            assert projector.own_calls == 2 and "forward" not in projector.__dict__

    def test_training_runs_the_original(self):
        model = accelerate(RosettaModel([open_projector()])).train()
        model.projector_list[0](*caches())
        assert model.projector_list[0].own_calls == 1

    def test_training_without_gumbel_gates_has_its_dropout(self):
        projector = open_projector().train()
        projector.use_gumbel = False
        accelerate(projector)
        projector(*caches())
        assert projector.own_calls == 1

    @pytest.mark.parametrize("later", [False, True])
    def test_hooks_of_the_package_accelerate_run_and_stay(self, later):
        hooks = pytest.importorskip("accelerate.hooks")

        class Counting(hooks.ModelHook):
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                self.calls += 1
                return args, kwargs

        projector, hook = open_projector(), Counting()
        original = projector.forward
        wanted = projector(*caches_of(3))
        if later:
            accelerate(projector)
            hooks.add_hook_to_module(projector, hook)
        else:
            hooks.add_hook_to_module(projector, hook)
            before = projector._old_forward
            accelerate(projector)
            assert projector._old_forward is not before
        for mine, theirs in zip(projector(*caches_of(3)), wanted, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert (hook.calls, projector.own_calls) == (1, 1)
        restore(projector)
        assert projector._old_forward is before if not later else projector._old_forward == original
        projector(*caches_of(3))
        assert (hook.calls, projector.own_calls) == (2, 2)
        hooks.remove_hook_from_module(projector)
        projector(*caches_of(3))
        assert (hook.calls, projector.own_calls) == (2, 3)

    def test_another_forward_of_the_instance_is_not_bypassed(self):
        projectors = [open_projector(), open_projector()]
        original, calls = projectors[1].forward, []

        def hooked(*arguments):
            calls.append(1)
            return original(*arguments)

        projectors[1].forward = hooked
        with pytest.raises(ValueError, match=r"a C2CProjector has a forward of the instance \(.*hooked\)"):
            accelerate(RosettaModel(projectors))
        assert "forward" not in projectors[0].__dict__ and projectors[1].forward is hooked
        # Put on afterwards it is around ours, and stays.
        del projectors[1].forward
        accelerate(RosettaModel(projectors))
        original = projectors[1].forward
        projectors[1].forward = hooked
        projectors[1](*caches())
        assert (len(calls), projectors[1].own_calls) == (1, 0)
        restore(RosettaModel(projectors))
        projectors[1](*caches())
        assert (len(calls), projectors[1].own_calls) == (2, 1)

    def test_gradients_in_evaluation(self):
        projector = open_projector()
        source, target = caches()
        source[0].requires_grad_()
        wanted = torch.autograd.grad(projector(source, target)[0].square().sum(), [source[0], projector.key_in.weight])
        accelerate(RosettaModel([projector]))
        got = torch.autograd.grad(projector(source, target)[0].square().sum(), [source[0], projector.key_in.weight])
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_sees_weights_that_change(self):
        projector = open_projector()
        accelerate(RosettaModel([projector]))
        source, target = caches()
        with torch.no_grad():
            projector(source, target)
            projector.load_state_dict({k: v * 0.5 for k, v in projector.state_dict().items()}, assign=True)
            got = projector(source, target)
            restore(projector)
            for mine, theirs in zip(got, projector(source, target), strict=True):
                torch.testing.assert_close(mine, theirs)

    def test_results_are_float32_as_theirs(self):
        projector = open_projector().bfloat16()
        source, target = caches()
        source, target = ([x.bfloat16() for x in pair] for pair in (source, target))
        accelerate(RosettaModel([projector]))
        with torch.no_grad():
            assert {x.dtype for x in projector(source, target)} == {torch.float32}

    def test_other_classes_are_refused_by_name(self):
        model = RosettaModel([open_projector(), AllInOneProjector()])
        with pytest.raises(CheckpointError, match="class AllInOneProjector, supported is C2CProjector"):
            accelerate(model)
        assert "forward" not in model.projector_list[0].__dict__

    def test_modules_that_lack_something_are_refused(self):
        with pytest.raises(ValueError, match="RosettaModel has no module of class C2CProjector"):
            accelerate(RosettaModel([]))
        projector = open_projector()
        del projector.value_scalar_head
        with pytest.raises(ValueError, match=r"value_scalar_head\.weight of a C2CProjector: no such parameter"):
            accelerate(RosettaModel([projector]))
        projector = open_projector(target_num_heads=3)
        projector.target_num_heads = 2
        with pytest.raises(ValueError, match=r"key_in\.weight of a C2CProjector: \(16, 42\), wanted shape \(16, 36\)"):
            accelerate(RosettaModel([projector]))

    def test_imports_no_rosetta(self):
        importlib.import_module("c2c_kernels.integrations.rosetta")
        assert "rosetta" not in sys.modules and not any(name.startswith("rosetta.") for name in sys.modules)
