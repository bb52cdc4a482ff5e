"""The split plan against the NumPy reference; which plan a pass gets, and why."""

import pytest
import torch
from test_attention_kernels import COMPILED, DTYPES

import moda_kernels
import moda_reference
from helpers import (
    Inputs,
    assert_accurate,
    assert_matches_reference,
    make_cotangents,
    make_inputs,
    plain_attention,
    rounding,
)
from moda_kernels import library, operators
from moda_kernels.operators import problem
from moda_kernels.plans import backward_plan, forward_plan
from moda_kernels.prepared import Problem
from moda_ops import ops

SHAPES = [  # B, T, S, G, H, D, L
    (1, 9, 9, 1, 2, 16, 1),
    (2, 13, 13, 2, 1, 24, 7),
    (1, 23, 23, 3, 2, 40, 5),
    (2, 17, 17, 4, 1, 64, 33),
    (1, 11, 11, 8, 2, 64, 3),
    (1, 7, 7, 5, 1, 128, 2),
    (1, 9, 9, 16, 1, 64, 20),
    (2, 13, 13, 2, 2, 32, 0),
    (1, 9, 31, 4, 2, 32, 3),  # not causal: all keys are seen
]
if COMPILED:
    SHAPES += [(2, 1000, 1000, 4, 2, 128, 72), (1, 777, 777, 64, 1, 64, 17)]


@pytest.fixture(autouse=True)
def no_determinism_is_asked_for(uninitialized_memory_is_nan, monkeypatch):
    """Which would rule split backward passes out; on a CPU, uninitialized memory stays NaN."""
    if COMPILED:
        torch.use_deterministic_algorithms(False)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize(("B", "T", "S", "G", "H", "D", "L"), SHAPES)
def test_split_matches_reference(B, T, S, G, H, D, L, form, dtype, device):
    if COMPILED and dtype is torch.float32:
        pytest.skip("no library computes float32 in full precision")
    inputs = make_inputs(B, T, G * H, H, D, L, S=S, dtype=dtype, device=device, form=form)
    options = 0.3, None, 0 if T == S else None, None, "split"

    def run(inputs, dout, dlse):
        p = problem(*inputs[:4], *options[:4])
        assert None not in (
            forward_plan("split", p, *inputs[:3]).library,
            backward_plan("split", p, *inputs[:3], None).library,
        )
        out, lse = moda_kernels.attention(*inputs, *options)
        grads = moda_kernels.attention_backward(dout, None, *inputs, out, lse, *options)
        assert all(x.is_contiguous() for x in (out, lse, *Inputs(*grads).leaves()))
        return out, lse, Inputs(*grads)

    dout, dlse = make_cotangents(inputs)
    cotangents = dout, torch.zeros_like(dlse)  # no library takes a gradient of lse
    assert_matches_reference(inputs, run, cotangents, causal=T == S, scale=0.3)


@pytest.mark.parametrize("plan", ["fused", "split"])
@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16])
def test_a_plan_adds_the_running_gradient(grad_dtype, newest, plan, device, monkeypatch):
    """A stream's passes, on top of what later readers have left."""
    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)
    inputs = make_inputs(2, 13, 4, 2, 16, 3, dtype=torch.float16, device=device)
    written = [torch.cat(slot, -1) for slot in zip(inputs.k_depth, inputs.v_depth, strict=True)]
    if newest:  # the sequence is a slot as well
        written.append(torch.cat(inputs[1:3], -1))
    buffer = torch.stack(written)
    running = 8 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(2))
    running = running.to(device, grad_dtype)
    token = torch.empty_strided(buffer.shape, (0,) * 5, dtype=grad_dtype, device=device)
    q, k, v = inputs.q, *((None, None) if newest else inputs[1:3])
    dout, dlse = make_cotangents(inputs)
    out, lse, _ = torch.ops.moda.stream_attention(q, k, v, buffer, token, plan=plan)
    dq, dk_dv, grads = torch.ops.moda.stream_attention_backward(
        dout, None, running, q, k, v, buffer, out, lse, len(buffer), grad_dtype, plan=plan
    )
    assert (grads.shape, grads.dtype) == (running.shape, grad_dtype) and grads.is_contiguous()

    def parts(dq, dk_dv, slots):
        *depth, last = (slot.split(16, -1) for slot in slots)
        if not newest:
            depth, last = [*depth, last], dk_dv
        return Inputs(dq, *last, *map(list, zip(*depth, strict=True))).leaves()

    arrays, leaves = inputs.numpy(), inputs.map(lambda x: x.detach().requires_grad_())
    exact = moda_reference.attention_backward(dout.double().cpu().numpy(), *arrays)
    plain_out, plain_lse = plain_attention(leaves)
    plain = torch.autograd.grad(plain_out, leaves.leaves(), dout)
    floor = rounding(inputs, dout, torch.zeros_like(dlse))  # no library takes a gradient of lse
    before = parts(torch.zeros_like(dq), [torch.zeros_like(x) for x in dk_dv], running)
    names = ["dq", "dk", "dv", *["dk_depth"] * 3, *["dv_depth"] * 3]
    for name, x, r, e, p in zip(
        names, parts(dq, dk_dv, grads), before, Inputs(*exact).leaves(), plain, strict=True
    ):
        assert_accurate(name, x, r.double().cpu().numpy() + e, (r + p).to(x.dtype), floor[name])
    exact_out, exact_lse = moda_reference.attention(*arrays)
    assert_accurate("out", out, exact_out, plain_out, floor["out"])
    assert_accurate("lse", lse, exact_lse, plain_lse, floor["lse"])


def causal_problem(**changes):
    """A sequence with more arithmetic than any threshold."""
    sizes = dict(B=1, T=16384, S=16384, L=1, H=8, G=8, D=64, DV=64)
    options = dict(scale=1.0, left=None, right=0, softcap=None)
    return Problem(**(sizes | options | changes))


def tensors(device, dtype=torch.float16, offset=0):
    """q, k and v of few tokens: the rule looks at their dtype, head dim and alignment."""
    q, k = (torch.empty(4 * n * 64 + 8, dtype=dtype, device=device) for n in (8, 1))
    q, k = (x[offset : x.numel() - 8 + offset].view(1, 4, -1, 64) for x in (q, k))
    return q, k, k


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(library, "select", lambda *tensors: "cudnn")


@pytest.mark.usefixtures("cudnn")
def test_auto_weighs_the_arithmetic_of_the_sequence(device):
    """The rows of docs/performance.md."""
    q_k_v = tensors(device)
    for sizes, splits in (
        (dict(), (True, True)),
        (dict(G=2), (False, True)),
        (dict(T=4096, S=4096), (False, True)),
        (dict(T=4096, S=4096, G=2), (False, False)),
        (dict(T=4096, S=4096, D=128, DV=128), (True, True)),
        (dict(T=2048, S=2048, D=128, DV=128), (False, True)),
        (dict(T=2048, S=2048, G=4, D=128, DV=128), (False, False)),
    ):
        p = causal_problem(**sizes)
        got = forward_plan("auto", p, *q_k_v), backward_plan("auto", p, *q_k_v, None)
        assert tuple(plan.library is not None for plan in got) == splits, sizes
        assert p.flops == 2 * 64 // (8 // p.G) * p.T**2 * p.D
    assert causal_problem(right=None).flops == 2 * causal_problem().flops


@pytest.mark.usefixtures("cudnn")
def test_auto_splits_sooner_where_depth_is_apart_anyway(device):
    """Rows of docs/measurements/attempts.json."""
    for B, T, G, D, splits in (
        (8, 2048, 3, 64, False),  # 4% to be gained
        (8, 2048, 4, 64, True),  # 9%, of a list
        (8, 2048, 5, 64, True),  # 9%
        (1, 4096, 7, 64, False),
        (1, 4096, 12, 64, True),
        (1, 2048, 6, 128, False),  # 4%
        (1, 2048, 7, 128, True),  # 5%
    ):
        p = causal_problem(B=B, T=T, S=T, G=G, H=4, D=D, DV=D)
        plans = [forward_plan("auto", p, *tensors(device), apart) for apart in (True, False)]
        assert [plan.library is not None for plan in plans] == [splits, False], p


@pytest.mark.parametrize(("G", "L", "apart"), [(3, 2, True), (2, 2, False), (3, 0, False)])
def test_the_forward_says_whether_depth_is_apart(G, L, apart, device, monkeypatch):
    told = []

    def plan(*arguments):
        told.append(arguments[-1])
        return forward_plan("fused", *arguments[1:])

    monkeypatch.setattr(operators, "forward_plan", plan)
    inputs = make_inputs(1, 5, G, 1, 16, L, device=device)
    moda_kernels.attention(*inputs, 0.25, None, 0, None)
    assert told == [apart]


def test_auto_splits_for_cudnn_alone(device, monkeypatch):
    p, q_k_v = causal_problem(), tensors(device)
    monkeypatch.setattr(library, "select", lambda *tensors: "flash")
    reason = "flash has not been measured to be faster"
    assert forward_plan("auto", p, *q_k_v) == (None, reason)
    assert backward_plan("auto", p, *q_k_v, None) == (None, reason)
    assert forward_plan("split", p, *q_k_v) == ("flash", "flash covers it")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(softcap=5.0), "a library has no softcap"),
        (dict(left=7), "a library has no window"),
        (dict(right=7), "a library has no window"),
        (dict(T=8192), "a library's causal mask needs T = S, got T = 8192 and S = 16384"),
    ],
)
def test_what_no_library_covers_is_fused(changes, reason, device):
    p, q_k_v = causal_problem(**changes), tensors(device)
    assert forward_plan("auto", p, *q_k_v) == (None, reason)
    assert backward_plan("split", p, *q_k_v, None) == (None, reason)
    assert forward_plan("fused", p, *q_k_v).library is None
    with pytest.raises(
        ValueError, match="plan must be 'auto' or 'fused' for this call, got 'split'"
    ):
        forward_plan("split", p, *q_k_v)


def test_backward_is_fused_where_only_forward_is_covered(device, monkeypatch):
    p, q_k_v = causal_problem(), tensors(device)
    assert backward_plan("split", p, *q_k_v, None).library is not None
    assert backward_plan("split", p, *q_k_v, q_k_v[0]).library is None
    wide = backward_plan("split", p._replace(G=64, D=256, DV=256), *q_k_v, None)
    assert wide == (None, "at this head dim a group of 64 goes by in parts")
    assert forward_plan("split", p, *q_k_v).library is not None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "deterministic" in backward_plan("split", p, *q_k_v, None).reason


@pytest.mark.gpu
def test_libraries_want_16_bit_dtypes_and_aligned_rows():
    p = causal_problem()
    assert forward_plan("auto", p, *tensors("cuda")).library is not None
    for q_k_v in (tensors("cuda", torch.float32), tensors("cuda", offset=1)):
        reason = "no library takes tensors of this dtype, head dim or alignment"
        assert forward_plan("auto", p, *q_k_v) == (None, reason)
