"""`fuse_kv`: every backend that has it against the reference in float64, in place and not; autograd; bad input."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from error_rule import GRADIENT_ULPS, assert_as_exact
from fuse_cases import FLOATS, FusePlan, arguments, build, floats, mapped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import c2c_kernels as c2c
from c2c_kernels.fuser_layers import FuserLayer, FuserShape

BACKENDS = [r.name for r in c2c.backends() if r.available and {"cpu", "any"} & {*r.devices, *r.by_name}]
COMPILED = [name for name in BACKENDS if name != "reference"]
backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
seeds = st.integers(0, 2**31)


@st.composite
def plans(draw) -> FusePlan:
    sizes = st.integers(1, 3)
    return FusePlan(
        *(draw(st.sampled_from(FLOATS)) for _ in range(3)),
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(sizes),
        key_dim=draw(st.sampled_from((4, 8, 17))),
        value_dim=draw(st.sampled_from((6, 8, 16))),
        length=draw(st.sampled_from((1, 2, 5, 19, 70))),
        sharer_heads=draw(sizes),
        sharer_key_dim=draw(st.sampled_from((4, 7, 16))),
        sharer_value_dim=draw(st.sampled_from((1, 8))),
        hidden=draw(st.sampled_from((5, 16, 40, 64))),
        inner=draw(st.sampled_from((3, 24, 48))),
        blocks=draw(sizes),
        index=draw(st.booleans()),
        residual=draw(st.booleans()),
        gates=draw(st.booleans()),
        closed=draw(st.sampled_from(((), (), ("key",), ("value",), ("key", "value")))),
        strided=draw(st.booleans()),
    )


def run(call: c2c.FuseCall, backend: str, out=None):
    positional, options = arguments(call)
    return c2c.fuse_kv(*positional, **options, out=out, backend=backend)


def oracle_of(call: c2c.FuseCall):
    return run(mapped(call, lambda tensor: tensor.detach().double()), "reference")


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A poisoned slice of a larger tensor to write to."""
    batch, heads, length, dim = tensor.shape
    return torch.full((batch, heads + 1, length + 2, dim), torch.nan, dtype=tensor.dtype)[:, 1:, 1:-1]


def torchs(call: c2c.FuseCall, like: torch.Tensor):
    """The call by PyTorch in the least of its dtypes, as its modules compute it."""
    least = max((tensor.dtype for tensor in floats(call)), key=lambda dtype: torch.finfo(dtype).eps)
    from c2c_kernels.backends import reference_fuse

    small = mapped(call, lambda tensor: tensor.detach().to(least))
    residual, gates = small.residual or (None, None), small.gates or (None, None)
    return [
        reference_fuse.fuse_half(own, raw, half, call.index, base, gate, least)
        for own, raw, half, base, gate in (
            (small.receiver_key, small.sharer_key, small.weights.key, residual[0], gates[0]),
            (small.receiver_value, small.sharer_value, small.weights.value, residual[1], gates[1]),
        )
    ]


@pytest.mark.sanitize
@backends
@given(plans(), seeds)
@settings(max_examples=100)
def test_matches_the_reference_in_float64(backend, plan, seed):
    call = build(plan, seed)
    exact = oracle_of(call)
    out = like(call.receiver_key), like(call.receiver_value)
    for ours in (run(call, backend), run(call, backend, out)):
        for slot, mine, theirs, oracle in zip(
            ("key", "value"), ours, torchs(call, call.receiver_key), exact, strict=True
        ):
            assert mine.dtype == plan.receiver
            # Arithmetic is float32 whatever the dtypes are: PyTorch's error in the least of them bounds ours.
            assert_as_exact(slot, mine, theirs.to(plan.receiver), oracle)


@backends
@given(plans(), seeds)
@settings(max_examples=15)
def test_float32_weights_are_not_rounded_to_the_dtype_of_caches(backend, plan, seed):
    """Out in float32 shows what is lost before the last rounding: PyTorch's error in float32 bounds ours."""
    call = build(dataclasses.replace(plan, weights=torch.float32), seed)
    single = run(mapped(call, torch.Tensor.float), "reference")
    out = [like(own).float() for own in (call.receiver_key, call.receiver_value)]
    for slot, mine, theirs, oracle in zip(
        ("key", "value"), run(call, backend, (out[0], out[1])), single, oracle_of(call), strict=True
    ):
        assert_as_exact(slot, mine, theirs, oracle)


@pytest.mark.sanitize
@backends
@given(plans(), seeds)
@settings(max_examples=40)
def test_in_place_is_the_same_and_touches_nothing_else(backend, plan, seed):
    call = build(plan, seed)
    wanted = run(call, backend)
    buffers = [
        torch.randn(plan.batch, plan.kv_heads + 1, plan.length + 4, own.shape[3]).to(plan.receiver)
        for own in (call.receiver_key, call.receiver_value)
    ]
    slices = [buffer[:, :-1, 3:-1] for buffer in buffers]
    # What out is: the residual where there is one, else the receiver.
    sources = call.residual or (call.receiver_key, call.receiver_value)
    for place, source in zip(slices, sources, strict=True):
        place.copy_(source)
    before = [buffer.clone() for buffer in buffers]
    pair = (slices[0], slices[1])
    changed = {"residual": pair} if plan.residual else {"receiver_key": pair[0], "receiver_value": pair[1]}
    got = run(dataclasses.replace(call, **changed), backend, pair)
    for slot, mine, result, buffer, old in zip(("key", "value"), got, wanted, buffers, before, strict=True):
        assert torch.equal(mine, result)
        if slot in plan.closed and not plan.gates:
            assert torch.equal(buffer, old)
        untouched = torch.ones_like(buffer, dtype=torch.bool)
        untouched[:, :-1, 3:-1] = False
        assert torch.equal(buffer[untouched], old[untouched])


@backends
@pytest.mark.parametrize("residual", [False, True])
def test_a_closed_half_is_left_as_it_is_whatever_it_holds(backend, residual):
    call = build(FusePlan(closed=("key", "value"), residual=residual, receiver=torch.bfloat16), 3)
    for tensor in (call.sharer_key, call.sharer_value, *(call.residual or (call.receiver_key, call.receiver_value))):
        tensor[:, :, 1] = torch.nan
        tensor[:, :, 2] = torch.inf
    sources = call.residual or (call.receiver_key, call.receiver_value)
    for mine, source in zip(run(call, backend), sources, strict=True):
        assert torch.equal(mine.view(torch.int16), source.contiguous().view(torch.int16))


@backends
def test_a_row_does_not_depend_on_the_batch(backend):
    call = build(FusePlan(batch=3, length=19, strided=False), 5)
    whole = run(call, backend)
    for row in range(3):
        part = c2c.FuseCall(
            *(cache[row : row + 1] for cache in
              (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)), call.weights,
        )  # fmt: skip
        for alone, together in zip(run(part, backend), whole, strict=True):
            if backend == "reference":
                torch.testing.assert_close(alone, together[row : row + 1])
            else:
                assert torch.equal(alone, together[row : row + 1])


@backends
@pytest.mark.parametrize("sizes", [{"length": 0}, {"batch": 0}])
def test_no_tokens(backend, sizes):
    call = build(FusePlan(strided=False, **sizes), 1)
    key, value = run(call, backend)
    assert key.shape == call.receiver_key.shape and value.shape == call.receiver_value.shape


@backends
def test_weights_that_change_are_seen(backend):
    call = build(FusePlan(), 2)
    run(call, backend)
    with torch.no_grad():
        for tensor in call.weights.tensors:
            tensor.mul_(-0.5)
        call.weights.key.gate_logit.fill_(1)
        call.weights.value.gate_logit.fill_(1)
    for mine, exact in zip(run(call, backend), oracle_of(call), strict=True):
        torch.testing.assert_close(mine, exact.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_are_those_of_single_calls(backend):
    if backend not in ("reference", "cpu"):
        pytest.skip("needs tensors on a device")
    calls = [build(FusePlan(hidden=8 * (number + 1), length=3 + number), number) for number in range(3)]
    outs = [(like(call.receiver_key), like(call.receiver_value)) for call in calls]
    calls[1] = dataclasses.replace(calls[1], out=outs[1])
    for (key, value), call in zip(c2c.fuse_layers(calls, backend=backend), calls, strict=True):
        wanted = run(call, backend)
        assert torch.equal(key, wanted[0]) and torch.equal(value, wanted[1])
    assert not outs[1][0].isnan().any() and outs[0][0].isnan().all()


def test_layers_of_different_devices_are_launched_apart(monkeypatch):
    """Each device's in one call, results in the order of the calls."""
    backends = importlib.import_module("c2c_kernels.backends")  # the package; c2c_kernels.backends is the function
    groups = []

    def grouped(name, calls):
        groups.append([call[0].device.type for call in calls])

    on_both = dataclasses.replace(
        next(record for record in c2c.backends() if record.name == "cpu"), devices=("cpu", "meta")
    )
    monkeypatch.setattr(backends, "_records", (on_both, *(r for r in c2c.backends() if r.name != "cpu")))
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(backends.kernels("cpu"), "fuse_kv_layers", grouped)
    here = build(FusePlan(), 1)
    there = mapped(here, lambda tensor: tensor.to("meta"))
    found = c2c.fuse_layers([here, there, here])
    assert groups == [["cpu", "cpu"], ["meta"]]
    assert [key.device.type for key, _ in found] == ["cpu", "meta", "cpu"]


@pytest.mark.parametrize("gates", [False, True])
def test_gradcheck_of_the_reference(gates):
    plan = FusePlan(length=2, hidden=3, inner=4, batch=1, index=True, residual=True, gates=gates, blocks=2)
    call = mapped(build(plan, 7), lambda tensor: tensor.double().detach().requires_grad_())
    tensors = floats(call)
    if not gates:
        for half in (call.weights.key, call.weights.value):
            half.gate_logit.requires_grad_(False)

    def of(*changed):
        parts = iter(changed)
        positional, options = arguments(mapped(call, lambda tensor: next(parts)))
        return c2c.fuse_kv(*positional, **options, backend="reference")

    assert torch.autograd.gradcheck(
        of, [*tensors[:4], *call.weights.tensors, *tensors[4 + len(call.weights.tensors) :]]
    )


def gradients(call: c2c.FuseCall, backend: str, cotangents):
    tensors = floats(call)
    made = run(call, backend)
    grads = torch.autograd.grad(
        made, tensors, [c.to(m.dtype) for c, m in zip(cotangents, made, strict=True)], allow_unused=True
    )
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(tensors, grads, strict=True)]


def check_gradients(call: c2c.FuseCall, backend: str) -> None:
    """Of every tensor of a call, against the reference in float64."""
    caches = (call.receiver_key, call.receiver_value)
    cotangents = [torch.randn(own.shape).to(own.dtype) for own in caches]
    leaf = lambda dtype: lambda tensor: tensor.detach().to(dtype or tensor.dtype).requires_grad_()  # noqa: E731
    ours = gradients(mapped(call, leaf(None)), backend, cotangents)
    exact = gradients(mapped(call, leaf(torch.float64)), "reference", cotangents)
    theirs = gradients(mapped(call, leaf(None)), "reference", cotangents)
    for number, (mine, torch_grad, oracle) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_as_exact(f"gradient {number}", mine, torch_grad, oracle, GRADIENT_ULPS)


@pytest.mark.parametrize("backend", COMPILED)
@given(plan=plans(), seed=seeds)
@settings(max_examples=40)
def test_gradients(backend, plan, seed):
    if backend != "cpu":
        pytest.skip("needs tensors on a device")
    check_gradients(build(plan, seed), backend)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"index": True, "residual": True, "gates": True}])
def test_opcheck(backend, requires_grad, options):
    call = mapped(build(FusePlan(strided=False, **options), 1), lambda t: t.detach().requires_grad_(requires_grad))
    rest = (list(call.weights.tensors), len(call.weights.key.tensors), call.index)
    caches = (call.receiver_key, call.receiver_value, call.sharer_key, call.sharer_value)
    residual, gates = list(call.residual or ()), list(call.gates or ())
    torch.library.opcheck(torch.ops.c2c.fuse_kv.default, (*caches, *rest, residual, gates, backend))
    if requires_grad:
        return
    out = [torch.zeros_like(own) for own in caches[:2]]
    both = call.residual or (None, None)
    for receiver in (caches[:2], (None, None)):
        described = (*receiver, *caches[2:], *rest, *both, gates, call.residual is not None, *out, backend)
        torch.library.opcheck(torch.ops.c2c.fuse_kv_out.default, described)


@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_in_place_and_with_gradients(backend):
    torch._dynamo.reset()
    call = build(FusePlan(strided=False), 1)
    positional, _ = arguments(call)

    def step(key, value, *rest):
        c2c.fuse_kv(key, value, *rest, call.weights, out=(key, value), backend=backend)
        return key * 2, value * 2

    wanted = [2 * tensor for tensor in run(call, backend)]
    copies = [tensor.clone() for tensor in positional[:4]]
    for mine, theirs in zip(torch.compile(step, backend="aot_eager", fullgraph=True)(*copies), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(copies[0] * 2, wanted[0])

    def loss(*caches):
        key, value = c2c.fuse_kv(*caches, call.weights, backend=backend)
        return key.square().sum() + value.sum()

    leaves = [tensor.clone().requires_grad_() for tensor in positional[:4]]
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for mine, theirs in zip(compiled, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


@backends
def test_what_happens_in_place_is_seen_by_autograd(backend):
    call = build(FusePlan(strided=False), 1)
    out, weight = call.receiver_key, torch.randn(call.receiver_key.shape, requires_grad=True)
    loss = (weight * out).sum()
    run(call, backend, (out, call.receiver_value))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def changed(**changes):
    return lambda call: dataclasses.replace(call, **{name: change(call) for name, change in changes.items()})


def half_changed(slot: str, **changes):
    def change(call):
        half = getattr(call.weights, slot)
        made = dataclasses.replace(half, **{name: edit(getattr(half, name)) for name, edit in changes.items()})
        return dataclasses.replace(call, weights=dataclasses.replace(call.weights, **{slot: made}))

    return change


BAD = {
    "no tensor": (changed(receiver_key=lambda c: [1]), TypeError, "receiver_key must be a tensor, got list"),
    "3d": (changed(sharer_key=lambda c: c.sharer_key[0]), ValueError, r"sharer_key has shape \(3, 5, 4\), wanted"),
    "integers": (changed(sharer_value=lambda c: c.sharer_value.int()), TypeError, "sharer_value has dtype torch.int32"),
    "value len": (changed(receiver_value=lambda c: c.receiver_value[:, :, :4]), ValueError, "receiver_value has shape"),
    "device": (changed(sharer_key=lambda c: c.sharer_key.to("meta")), ValueError, "sharer_key is on meta, wanted cpu"),
    "batch": (
        changed(sharer_key=lambda c: c.sharer_key[:1], sharer_value=lambda c: c.sharer_value[:1]),
        ValueError, "sharer_key has batch 1, wanted 2 like receiver_key",
    ),
    "length": (
        changed(sharer_key=lambda c: c.sharer_key[:, :, :3], sharer_value=lambda c: c.sharer_value[:, :, :3]),
        ValueError, "sharer_key has 3 tokens and receiver_key 5: without an index",
    ),
    "index shape": (changed(index=lambda c: torch.zeros(5).long()), ValueError, r"index has shape \(5,\), wanted"),
    "index dtype": (changed(index=lambda c: torch.zeros(2, 5)), TypeError, "index has dtype torch.float32"),
    "index": (changed(index=lambda c: torch.full((2, 5), 5)), ValueError, r"index has values outside 0..4"),
    "negative index": (changed(index=lambda c: torch.full((2, 5), -1)), ValueError, r"index has values outside 0..4"),
    "weights": (changed(weights=lambda c: None), TypeError, "weights must be FuserWeights, got NoneType"),
    "in": (half_changed("key", in_weight=lambda w: w[:, 1:]), ValueError, r"weights.key.in_weight has shape"),
    "out": (half_changed("value", out_weight=lambda w: w[1:]), ValueError, "weights.value.out_weight has shape"),
    "bias": (half_changed("value", in_bias=lambda w: w[1:]), ValueError, r"weights.value.in_bias has shape \(15,\)"),
    "gate": (half_changed("key", gate_logit=lambda w: w[None]), ValueError, "weights.key.gate_logit has shape"),
    "mixed": (half_changed("key", out_bias=lambda w: w.half()), TypeError, "weights.key.out_bias has dtype"),
    "no blocks": (half_changed("key", project=lambda w: ()), ValueError, "weights.key.project must be a tuple of at"),
    "block": (
        half_changed("key", embed=lambda b: dataclasses.replace(b, w2=b.w2[:, 1:])), ValueError,
        r"weights.key.embed.w2 has shape \(16, 23\), wanted \(hidden, inner\) = \(16, 24\)",
    ),
    "residual": (changed(residual=lambda c: c.receiver_key), TypeError, "residual must be a pair"),
    "residual shape": (
        changed(residual=lambda c: (c.receiver_key, c.receiver_key)), ValueError, "residual value has shape",
    ),
    "gates": (
        changed(gates=lambda c: (torch.ones(3), torch.ones(1))), ValueError, r"gates key has shape \(3,\)",
    ),
    "out shape": (
        changed(out=lambda c: (c.receiver_key, c.receiver_key)), ValueError, "out value has shape",
    ),
    "out broadcast": (
        changed(out=lambda c: (c.receiver_key[:1].expand(2, 2, 5, 8), c.receiver_value)), ValueError,
        "out key has shape .* its elements share memory",
    ),
    "out folded": (
        changed(out=lambda c: (torch.empty(99).as_strided((2, 2, 5, 8), (20, 10, 4, 1)), c.receiver_value)),
        ValueError, "out key has shape .* its elements share memory",
    ),
    "out shifted": (
        changed(receiver_key=lambda c: c.receiver_key[:, :1].expand(2, 2, 5, 8), out=lambda c: (
            c.receiver_key, c.receiver_value)), ValueError, "out key shares memory",
    ),
}  # fmt: skip


@backends
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(backend, name):
    call = build(FusePlan(strided=False), 4)
    call = dataclasses.replace(call, out=(call.receiver_key, call.receiver_value))
    before = [tensor.clone() for tensor in floats(call)]
    change, error, match = BAD[name]
    bad = change(call)
    if name not in ("out shape", "out broadcast", "out folded", "out shifted") and isinstance(
        bad.receiver_key, torch.Tensor
    ):
        bad = dataclasses.replace(bad, out=(call.receiver_key, call.receiver_value))
    positional, options = arguments(bad)
    options["out"] = bad.out
    with pytest.raises(error, match=match):
        c2c.fuse_kv(*positional, **options, backend=backend)
    with pytest.raises(error, match=rf"calls\[1\]\.{match}"):
        c2c.fuse_layers([call, bad], backend=backend)
    for tensor, old in zip(floats(call), before, strict=True):
        assert torch.equal(tensor, old)


@backends
def test_weights_that_lie_elsewhere_are_checked_again(backend):
    call = build(FusePlan(), 1)
    for _ in range(2):
        run(call, backend)
    call.weights.value.in_bias.data = torch.zeros(3)
    with pytest.raises(ValueError, match=r"weights\.value\.in_bias has shape \(3,\)"):
        run(call, backend)
    call.weights.value.in_bias.data = torch.zeros(16)
    run(call, backend)
    wider = build(FusePlan(sharer_heads=4), 1)
    with pytest.raises(ValueError, match=r"weights\.key\.in_weight has shape"):
        run(dataclasses.replace(call, sharer_key=wider.sharer_key, sharer_value=wider.sharer_value), backend)


@backends
def test_weights_that_lie_otherwise_at_the_same_address_are_seen(backend):
    """As freed memory may be given to a tensor of another shape, or dtype."""
    call = build(FusePlan(inner=16), 1)
    half = call.weights.key
    run(call, backend)
    before = half.in_bias.data
    half.in_bias.data = before[:8]
    with pytest.raises(ValueError, match=r"weights\.key\.in_bias has shape \(8,\)"):
        run(call, backend)
    half.in_bias.data = before.view(torch.bfloat16)[:16]
    with pytest.raises(TypeError, match=r"weights\.key\.in_bias has dtype torch\.bfloat16"):
        run(call, backend)
    half.in_bias.data = before
    half.embed.w1.data = half.embed.w1.data.t()
    for mine, exact in zip(run(call, backend), oracle_of(call), strict=True):
        torch.testing.assert_close(mine, exact.float())


@pytest.mark.parametrize("backend", COMPILED)
def test_a_trace_is_not_made_again_for_what_is_known_of_weights(backend):
    torch._dynamo.reset()
    layer = FuserLayer(FuserShape(3, 4, 5, 2, 8, 6, hidden=16, inner=24)).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    calls = [build(FusePlan(strided=False), seed) for seed in range(4)]
    pairs = [((c.receiver_key, c.receiver_value), (c.sharer_key, c.sharer_value)) for c in calls]
    with torch.no_grad():
        for call, pair in zip(calls, pairs, strict=True):
            compiled(*pair, backend=backend)
            run(call, backend)  # of weights that have not been seen
            layer(*pair, backend=backend)
    assert counter.frame_count == 1


@backends
def test_layers_may_not_write_where_others_read_or_write(backend):
    sizes = {"key_dim": 8, "value_dim": 8, "sharer_heads": 2, "sharer_key_dim": 8, "sharer_value_dim": 8}
    first, second, third = (build(FusePlan(strided=False, **sizes), seed) for seed in range(3))
    calls = [
        dataclasses.replace(first, out=(first.receiver_key, first.receiver_value)),
        second,
        dataclasses.replace(third, sharer_key=first.receiver_key),
    ]
    before = [tensor.clone() for call in calls for tensor in floats(call)]
    with pytest.raises(ValueError, match=r"calls\[0\] writes to memory that calls\[2\] reads or writes"):
        c2c.fuse_layers(calls, backend=backend)
    calls[2] = dataclasses.replace(third, out=(torch.empty(2, 2, 5, 8), first.receiver_value))
    with pytest.raises(ValueError, match=r"calls\[[02]\] writes to memory that calls\[[02]\] reads or writes"):
        c2c.fuse_layers(calls, backend=backend)
    after = [tensor for call in (calls[0], second, third) for tensor in floats(call)]
    for old, tensor in zip(before, after, strict=True):
        assert torch.equal(old, tensor) or tensor is third.sharer_key
    # Layers of one buffer are apart.
    stacked = torch.randn(2, 2, 2, 2, 5, 8)
    apart = [
        dataclasses.replace(call, receiver_key=key, receiver_value=value, out=(key, value))
        for call, (key, value) in zip((first, second), stacked.unbind(), strict=True)
    ]
    wanted = [run(dataclasses.replace(call, out=None), backend) for call in apart]
    for mine, pair in zip(c2c.fuse_layers(apart, backend=backend), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, pair, strict=True))


@backends
def test_the_stride_of_one_row_does_not_matter_in_place(backend):
    call = build(FusePlan(batch=1, strided=False), 1)
    wanted = run(call, backend)
    out = [own.as_strided(own.shape, (7, *own.stride()[1:])) for own in (call.receiver_key, call.receiver_value)]
    for mine, theirs in zip(run(call, backend, (out[0], out[1])), wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_out_with_autograd_is_refused():
    call = build(FusePlan(), 1)
    call.weights.key.in_bias.requires_grad_()
    with pytest.raises(ValueError, match="without autograd, but a tensor of the call requires grad"):
        run(call, "reference", (call.receiver_key, call.receiver_value))


def test_float64_goes_to_the_reference_and_nowhere_else():
    call = mapped(build(FusePlan(), 1), torch.Tensor.double)
    assert run(call, None)[0].dtype == torch.float64  # type: ignore[arg-type]
    for name in ("cpu", "triton", "cuda"):
        with pytest.raises(ValueError, match=f"{name}: "):
            run(call, name)
