"""What only a GPU can show: graphs, large offsets, launches per call."""

import pytest
import torch

from helpers import Inputs, assert_matches_reference, make_inputs
from moda_ops import moda_attention
from test_ops import run_public

pytestmark = pytest.mark.gpu
SHAPE = dict(B=2, T=100, HQ=8, H=2, D=64, L=5, dtype=torch.bfloat16, device="cuda")


def forward_backward(inputs: Inputs, dout):
    out = moda_attention(*inputs)
    return [out, *torch.autograd.grad(out, inputs.leaves(), dout)]


def leaves(seed: int) -> Inputs:
    return make_inputs(**SHAPE, seed=seed).map(lambda x: x.requires_grad_())


def test_graph_capture_replays_with_new_inputs():
    static, dout = leaves(0), torch.randn(2, 100, 8, 64).to("cuda", torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward_backward(static, dout)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_backward(static, dout)
    for seed in (1, 2):
        fresh = leaves(seed)
        with torch.no_grad():
            for a, b in zip(static.leaves(), fresh.leaves(), strict=True):
                a.copy_(b)
        graph.replay()
        for a, b in zip(results, forward_backward(fresh, dout), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_reduce_overhead_replays_with_new_inputs():
    torch._dynamo.reset()
    compiled = torch.compile(moda_attention, mode="reduce-overhead", fullgraph=True)
    dout = torch.randn(2, 100, 8, 64).to("cuda", torch.bfloat16)
    for seed in range(4):
        fresh = leaves(seed)
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*fresh)
        grads = torch.autograd.grad(out, fresh.leaves(), dout)
        for a, b in zip([out, *grads], forward_backward(fresh, dout), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inductor_in_every_dtype(dtype):
    torch._dynamo.reset()
    inputs = make_inputs(**(SHAPE | {"dtype": dtype}))
    assert_matches_reference(inputs, run_public(torch.compile(moda_attention, fullgraph=True)))


def test_more_than_2_31_depth_elements():
    """The last tokens of a stream past 2^31 elements; a window keeps their reference small."""
    T, H, D, L, last, window = 16_500, 8, 64, 256, 8, 15
    assert T * H * D * L > 2**31
    generator = torch.Generator("cuda").manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    inputs = Inputs(
        make(1, T, H, D),
        make(1, T, H, D),
        make(1, T, H, D),
        [make(1, T, L, H, D)],
        [make(1, T, L, H, D)],
    )
    options = (D**-0.5, window, 0, None)
    import moda_kernels

    out, lse = moda_kernels.attention(*inputs, *options)
    dout = torch.zeros_like(out)
    dout[:, -last:] = make(1, last, H, D)
    grads = moda_kernels.attention_backward(dout, None, *inputs, out, lse, *options)

    tail = Inputs(
        inputs.q[:, -last:],
        inputs.k[:, -last - window :],
        inputs.v[:, -last - window :],
        [inputs.k_depth[0][:, -last:]],
        [inputs.v_depth[0][:, -last:]],
    )

    def run(_, dout_tail, dlse):
        return out[:, -last:], lse[..., -last:], Inputs(
            grads[0][:, -last:], grads[1][:, -last - window :], grads[2][:, -last - window :],
            [grads[3][0][:, -last:]], [grads[4][0][:, -last:]],
        )  # fmt: skip

    cotangents = dout[:, -last:], torch.zeros(1, H, last, device="cuda")
    assert_matches_reference(tail, run, cotangents, window=window)


def test_launches_do_not_depend_on_length_or_slots():
    """No recompilation for a new T or L: they are run-time values of the kernels."""
    from moda_kernels import launch

    def variants() -> int:
        kernels = (launch._moda_forward_kernel, launch._moda_backward_depth_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    def call(T: int, L: int) -> None:
        inputs = make_inputs(1, T, 8, 2, 64, L, dtype=torch.bfloat16, device="cuda")
        forward_backward(inputs.map(lambda x: x.requires_grad_()), torch.ones_like(inputs.q))

    call(37, 3)
    call(48, 16)  # Triton compiles once more for multiples of 16
    call(37, 16)
    call(48, 3)
    before = variants()
    for T, L in ((39, 5), (112, 32), (101, 80), (64, 33)):
        call(T, L)
    assert variants() == before
