"""torch.autocast on every operator: what is cast, to what, and what is not."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event, local

import pytest
import torch

from helpers import make_inputs
from moda_ops import (
    DepthSlots,
    DepthStream,
    moda_attention,
    moda_decode,
    moda_depth_mass,
    moda_sink_mass,
)
from moda_ops.operators import eager
from moda_ops.rules.operator import OPERATORS
from operators import BACKWARD, DIFFERENTIABLE, make_call

LOW = torch.bfloat16


def cast(leaves, dtype=LOW):
    return [x.to(dtype) if x.is_floating_point() else x for x in leaves]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


def test_every_operator_has_a_rule_or_none_on_purpose():
    registered = torch._C._dispatch_get_all_op_names()
    names = {op.removeprefix("moda::") for op in registered if op.startswith("moda::")}
    no_input_to_cast = {"stream_buffer", "stream_read"}
    as_saved = {*BACKWARD, "stream_attention_backward"}
    assert names == set(OPERATORS)
    without = {name for name, operator in OPERATORS.items() if operator.autocast is None}
    assert without == no_input_to_cast | as_saved


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_runs_in_the_dtype_of_autocast(name, form, device):
    call = make_call(name, form=form, device=device)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in call.leaves()]
    lower = [x.detach().requires_grad_(x.requires_grad) for x in cast(leaves)]
    with torch.autocast(device.type, LOW):
        out, lse = call.run(*leaves)
        mixed = call.run(*(y if i % 2 else x for i, (x, y) in enumerate(zip(leaves, lower))))  # noqa: B905
        half = call.run(*cast(leaves, torch.float16))
    expected = call.run(*lower)
    assert out.dtype is LOW and lse.dtype is torch.float32
    assert_equal((out, lse), expected)
    assert_equal(mixed, expected)
    assert half[0].dtype is LOW

    needed = [i for i, x in enumerate(leaves) if x.requires_grad]
    for run in (torch.autocast(device.type, LOW), torch.autocast(device.type, enabled=False)):
        with run:  # backward under autocast, which PyTorch advises against, and without
            grads = torch.autograd.grad(
                (out.float().sin().sum() + lse.clamp(min=-9).sum()),
                [leaves[i] for i in needed],
                retain_graph=True,
            )
        exact = torch.autograd.grad(
            (expected[0].float().sin().sum() + expected[1].clamp(min=-9).sum()),
            [lower[i] for i in needed],
            retain_graph=True,
        )
        assert_equal(grads, [g.float() for g in exact])


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_takes_what_forward_saved(name, device):
    call = make_call(name, device=device)
    with torch.autocast(device.type, LOW):
        results = call.run()
    assert_equal(results, call.run())


def test_masses_take_what_attention_took(device):
    """q in one dtype, keys in another, and lse, which is never cast."""
    x = make_inputs(2, 5, 4, 2, 8, 3, S=7, device=device)
    low = x.map(lambda tensor: tensor.to(LOW))
    with torch.autocast(device.type, LOW):
        _, lse = moda_attention(low.q, x.k, x.v, x.k_depth, low.v_depth, return_lse=True)
        mixed = moda_depth_mass(low.q, x.k_depth, lse), moda_sink_mass(low.q, x.k, lse, keys=2)
    exact = moda_depth_mass(low.q, low.k_depth, lse), moda_sink_mass(low.q, low.k, lse, keys=2)
    assert_equal(mixed, exact)
    with pytest.raises(TypeError, match=r"k must have dtype torch\.bfloat16 to fit q"):
        moda_sink_mass(low.q, x.k, lse)


@pytest.mark.parametrize("page_size", [None, 2])
def test_a_cache_decides_for_its_operator(page_size, device):
    case = make_call("decode", page_size=page_size, device=device)
    q, k_cache, v_cache, *rest = case.leaves()
    low = [x.to(LOW) for x in (k_cache, v_cache)]
    with torch.autocast(device.type, LOW):
        into_float32 = case.run(q.to(LOW), k_cache, v_cache, *cast(rest))
        into_bfloat16 = case.run(q, *low, *rest)
    rounded = cast(cast([q, *rest]), torch.float32)
    assert_equal(into_float32, case.run(rounded[0], k_cache, v_cache, *rounded[1:]))
    assert_equal(into_bfloat16, case.run(*cast([q, k_cache, v_cache, *rest])))


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_appending_writes_to_the_cache_itself(dtype, device):
    q, k, v = torch.randn(3, 2, 1, 2, 8, device=device)
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=device)
    caches = torch.zeros(2, 2, 5, 2, 8, dtype=dtype, device=device)
    with torch.autocast(device.type, LOW):
        out = moda_decode(q, *caches, [k], [v], lengths, k_new=k, v_new=v)
    assert out.dtype is dtype
    assert torch.equal(caches[0][0, 3], k[0, 0].to(dtype))
    assert torch.equal(caches[1][1, 0], v[1, 0].to(dtype))
    mixed = caches[0], caches[1].half()
    with torch.autocast(device.type, LOW), pytest.raises(TypeError, match="v_cache must have"):
        moda_decode(q, *mixed, [k], [v], lengths, k_new=k, v_new=v)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_a_stream_decides_for_its_operators(dtype, device):
    q, k, v = torch.randn(3, 1, 4, 2, 8, device=device)
    q.requires_grad_()

    def run(stream, q, k, v):
        out, stream = stream.write(k, v).attend(q)
        return stream.write(v, k).attend(out, k, v)[0]

    def allocate():
        return DepthStream.allocate(
            2, 1, 4, 2, 8, dtype=dtype, device=device, grad_dtype=torch.float32
        )

    with torch.autocast(device.type, LOW):
        out = run(allocate(), q, k.to(dtype), v)
    expected = run(allocate(), *(x.to(dtype) for x in (q, k, v)))
    assert_equal([out], [expected])
    grads = [torch.autograd.grad(x.float().square().sum(), q) for x in (out, expected)]
    assert_equal(*grads)
    assert grads[0][0].dtype is torch.float32 and grads[0][0].abs().max() > 1e-3
    with torch.autocast(device.type, LOW):
        after = allocate().write(k, v).attend(q)[1]
    assert after.token.dtype is torch.float32  # that of the running gradient
    with torch.autocast(device.type, LOW):
        slots = run(DepthSlots(), q, k, v)
    assert slots.dtype is LOW


def test_what_is_not_cast():
    q = torch.randn(1, 4, 2, 8)
    with torch.autocast("cpu", LOW):
        assert moda_attention(*[q.double()] * 3).dtype is torch.float64
        with torch.autocast("cpu", enabled=False):
            assert moda_attention(q, q, q).dtype is torch.float32
        with pytest.raises(TypeError, match=r"k must have dtype torch\.float64"):
            moda_attention(q.double(), q, q)
    with torch.autocast("cuda", LOW) if torch.cuda.is_available() else torch.no_grad():
        assert moda_attention(q, q, q).dtype is torch.float32


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *BACKWARD, "decode"])
def test_two_threads_keep_their_own_state(name, monkeypatch):
    """One leaves an operator while another, under autocast of another dtype, is inside."""
    call, grouped = make_call(name), eager._grouped
    first_is_in, second_is_in, first_is_out, thread = Event(), Event(), Event(), local()

    def meet(*arguments):
        if thread.is_first:
            first_is_in.set()
            assert second_is_in.wait(30)
        else:
            second_is_in.set()
            assert first_is_out.wait(30)
        return grouped(*arguments)

    def run(dtype):
        thread.is_first = dtype is torch.float16
        with torch.autocast("cpu", dtype):
            call.run()
            if thread.is_first:
                first_is_out.set()
            return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    monkeypatch.setattr(eager, "_grouped", meet)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, torch.float16)
        assert first_is_in.wait(30)
        second = threads.submit(run, torch.bfloat16)
        assert (first.result(), second.result()) == ((True, torch.float16), (True, torch.bfloat16))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic, device):
    torch._dynamo.reset()
    x = [torch.randn(1, 5, 2, 8, device=device, requires_grad=True) for _ in range(5)]

    def f(q, k, v, k_slot, v_slot):
        with torch.autocast(device.type, LOW):
            out = moda_attention(q, k, v, [k_slot, k], [v_slot, v])
            stream = DepthStream.allocate(1, 1, q.shape[1], 2, 8, device=device)
            return out + stream.write(k, v).attend(q)[0]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = [f(*x), compiled(*x)]
    assert results[0].dtype is LOW
    assert_equal(results[:1], results[1:])
    grads = [torch.autograd.grad(y.float().square().sum(), x) for y in results]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
