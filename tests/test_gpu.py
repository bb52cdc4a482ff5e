"""What only a GPU can show: graphs, large offsets, launches per call."""

import pytest
import torch

from helpers import Inputs, assert_matches_reference, make_inputs
from moda_ops import DepthStream, moda_attention, moda_attention_varlen
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


def packed_leaves() -> Inputs:
    inputs = make_inputs(**(SHAPE | {"B": 1}))
    return inputs.map(lambda x: x[0].requires_grad_())


def test_graph_of_packed_documents_replays_with_other_lengths():
    """Lengths are read on the device: nothing of them is in the graph."""
    inputs = packed_leaves()
    static = torch.zeros(5, dtype=torch.int32, device="cuda")

    def run(cu):
        out = moda_attention_varlen(*inputs, cu, cu)
        return [out, *torch.autograd.grad(out, inputs.leaves(), torch.ones_like(out))]

    lengths = [[0, 25, 50, 75, 100], [0, 0, 3, 99, 100], [0, 100, 100, 100, 100]]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        static.copy_(torch.tensor(lengths[0]))
        run(static)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(static)
    for cu in lengths:
        cu = torch.tensor(cu, dtype=torch.int32, device="cuda")
        static.copy_(cu)
        graph.replay()
        for a, b in zip(results, run(cu), strict=True):
            assert torch.equal(a, b)


def test_packed_documents_synchronize_nothing():
    inputs = packed_leaves()
    cu = torch.tensor([0, 0, 3, 99, 100], dtype=torch.int32, device="cuda")

    def run():
        out = moda_attention_varlen(*inputs, cu, cu)
        torch.autograd.grad(out, inputs.leaves(), torch.ones_like(out))

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def stream_forward_backward(x):
    """Four layers over a DepthStream that is allocated inside."""
    y, stream = x, DepthStream.allocate(4, *x.shape[:2], 2, 64, dtype=x.dtype, device="cuda")
    for _ in range(4):
        y, stream = stream.write(y[:, :, :2].sin(), y[:, :, :2].cos()).attend(y)
    return y


def fresh_input(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 100, 8, 64, generator=generator)
    return x.to("cuda", torch.bfloat16).requires_grad_()


def with_gradient(f, x):
    out = f(x)
    return [out, torch.autograd.grad(out, x, torch.ones_like(out))[0]]


def test_graph_capture_of_a_stream():
    static, side = fresh_input(0), torch.cuda.Stream()
    with torch.cuda.stream(side):
        with_gradient(stream_forward_backward, static)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = with_gradient(stream_forward_backward, static)
    for seed in (1, 2):
        x = fresh_input(seed)
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        for a, b in zip(results, with_gradient(stream_forward_backward, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_reduce_overhead_of_a_stream():
    torch._dynamo.reset()
    compiled = torch.compile(stream_forward_backward, mode="reduce-overhead", fullgraph=True)
    eager = torch.compile(stream_forward_backward, fullgraph=True)
    for seed in range(4):
        x = fresh_input(seed)
        torch.compiler.cudagraph_mark_step_begin()
        for a, b in zip(with_gradient(compiled, x), with_gradient(eager, x), strict=True):
            assert torch.equal(a, b)


def test_kernels_per_layer_do_not_depend_on_the_stream():
    from torch.profiler import ProfilerActivity, profile

    def kernels(layers: int) -> int:
        def run(x):
            y, stream = x, DepthStream.allocate(9, 2, 100, 2, 64, dtype=x.dtype, device="cuda")
            for _ in range(layers):
                y, stream = stream.write(y[:, :, :2], y[:, :, 2:4]).attend(y)
            return y

        x = fresh_input(0)
        with_gradient(run, x)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            with_gradient(run, x)
            torch.cuda.synchronize()
        return sum(event.device_type.name == "CUDA" for event in profiler.events())

    three, six, nine = map(kernels, (3, 6, 9))
    assert nine - six == six - three > 0


@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_would_write_to_a_copy_is_an_error():
    """Per-block graphs copy their inputs, also the buffer of a stream made outside of them."""
    torch._dynamo.reset()

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def block(y, stream):
        return stream.write(y[:, :, :2].sin(), y[:, :, :2].cos()).attend(y)

    @torch.no_grad()
    def step(seed):
        torch.compiler.cudagraph_mark_step_begin()
        x = fresh_input(seed)
        stream = DepthStream.allocate(4, 2, 100, 2, 64, dtype=x.dtype, device="cuda")
        for _ in range(2):
            x, stream = block(x, stream)

    with pytest.raises(RuntimeError, match="allocate the DepthStream inside"):
        list(map(step, range(4)))
