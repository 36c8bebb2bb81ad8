"""What only a GPU shows: capture in a CUDA graph, calls that make the host wait, torch.compile.

Run by test_processes.py; not run on hardware yet. That the results of these calls are right is shown in
interpreted_forward.py, on a GPU too.
"""

from __future__ import annotations

import pytest
import torch
from triton_calls import CALLS, decode_raw
from triton_device import ON_GPU, there

import c2c_kernels as c2c
from c2c_kernels.backends import choose

pytestmark = pytest.mark.skipif(not ON_GPU, reason="C2C_TRITON_DEVICE=cuda is wanted")


def call_of(name: str):
    """A call without arguments whose inputs are on the GPU, and these inputs."""
    function, arguments, options = CALLS[name]()
    arguments, options = there(arguments), there(options)
    return (lambda: function(*arguments, **options)), (arguments, options)


def tensors(value) -> list[torch.Tensor]:
    """Every tensor in nested arguments."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, c2c.SharerSegment):
        value = list(vars(value).values())
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []


def assert_same_bits(ours, wanted) -> None:
    for one, other in zip(ours, wanted, strict=True):
        assert torch.equal(one, other)


def test_cuda_tensors_go_to_triton_where_cuda_does_not_take_them():
    cuda = next(record for record in c2c.backends() if record.name == "cuda")
    for dtype in (torch.bfloat16, torch.float32):
        name = "triton" if cuda.refusal(torch.device("cuda"), dtype) else "cuda"
        call = (torch.empty(1, 1, 1, 64, dtype=dtype), torch.empty(1, 1, 1, 64, dtype=dtype), [], "auto", ())
        assert choose("merged_attention", None, torch.device("cuda"), dtype, "", call).name == name


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_follows_its_inputs(name):
    call, inputs = call_of(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    before = [tensor.clone() for tensor in captured]
    assert_same_bits(before, call())
    for tensor in tensors(inputs):
        if tensor.dtype == torch.bfloat16:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    assert_same_bits(captured, call())
    assert not torch.equal(captured[0], before[0])


def test_absorbed_decode_gives_the_same_bits_a_thousand_times():
    """Its programs wait for each other: in a graph calls follow at once, and start in every order a device has."""
    function, arguments, options = decode_raw(20_000)
    arguments, options = there(arguments), there({**options, "strategy": "absorb", "backend": "triton"})

    def call():
        return function(*arguments, **options)

    wanted = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for _ in range(20)]
    for _ in range(50):
        graph.replay()
        for found in captured:
            assert_same_bits(found, wanted)
            for tensor in found:
                tensor.fill_(float("nan"))


@pytest.fixture
def waiting_is_an_error():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_the_host_does_not_wait(name, waiting_is_an_error):
    call, _ = call_of(name)
    call()
    torch.cuda.synchronize()
    waiting_is_an_error()
    call()


def test_the_mode_notices_waiting(waiting_is_an_error):
    number = torch.ones(1, device="cuda")
    waiting_is_an_error()
    with pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


@pytest.mark.parametrize("name", ["decode", "prefill", "prefill raw"])
def test_gradients_do_not_make_the_host_wait(name, waiting_is_an_error):
    call, inputs = call_of(name)
    for leaf in (tensor for tensor in tensors(inputs) if tensor.dtype == torch.bfloat16):
        leaf.requires_grad_()

    def both_ways() -> None:
        call()[0].float().square().sum().backward()

    both_ways()
    torch.cuda.synchronize()
    waiting_is_an_error()
    both_ways()


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_give_the_same_bits(name):
    function, arguments, options = CALLS[name]()
    arguments, options = there(arguments), there(options)
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: function(*given, **options), fullgraph=True)
    assert_same_bits(compiled(*arguments), function(*arguments, **options))


@pytest.mark.parametrize("name", CALLS)
def test_two_runs_give_the_same_bits(name):
    call, _ = call_of(name)
    assert_same_bits(call(), call())
