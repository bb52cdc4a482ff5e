"""The split plan against the NumPy reference; which plan a pass gets, and why."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
from test_stream_kernels import as_stream

import moda_kernels
import moda_reference
from helpers import (
    COMPILED,
    Inputs,
    assert_accurate,
    assert_matches_reference,
    in_dtypes,
    make_cotangents,
    make_inputs,
    plain_attention,
    rounding,
)
from moda_kernels import operators, sdpa, tuning
from moda_kernels.launch import Problem
from moda_kernels.operators import problem
from moda_kernels.plans import backward_plan, forward_plan
from moda_ops.operators import definition as ops

MEASUREMENTS = Path(__file__).parents[2] / "docs" / "measurements"
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


def split_cases():
    for (n, sizes), (f, form) in itertools.product(
        enumerate(SHAPES), enumerate(["list", "packed"])
    ):
        yield from in_dtypes(n + f, *sizes, form, id=f"{sizes}-{form}")


@pytest.mark.parametrize(("B", "T", "S", "G", "H", "D", "L", "form", "dtype"), list(split_cases()))
def test_split_matches_reference(B, T, S, G, H, D, L, form, dtype, device):
    if COMPILED and dtype is torch.float32:
        pytest.skip("no library computes float32 in full precision")
    inputs = make_inputs(B, T, G * H, H, D, L, S=S, dtype=dtype, device=device, form=form)
    options = 0.3, None, 0 if T == S else None, None, "split"

    def run(inputs, dout, dlse):
        p = problem(*inputs[:4], *options[:4])
        assert None not in (
            forward_plan("split", p, *inputs[:3], False).library,
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
    B, T = (2, 13) if COMPILED else (1, 5)
    inputs = make_inputs(B, T, 4, 2, 16, 3, dtype=torch.float16, device=device)
    buffer, token = as_stream(inputs, newest, grad_dtype)
    running = 8 * torch.randn(token.shape, generator=torch.Generator().manual_seed(2))
    running = running.to(device, grad_dtype)
    q, k, v = inputs.q, *((None, None) if newest else inputs[1:3])
    dout, dlse = make_cotangents(inputs)
    out, lse, _ = torch.ops.moda.stream_attention(q, k, v, buffer, token, plan=plan)
    dq, dk_dv, grads = torch.ops.moda.stream_attention_backward(
        dout, None, running, q, k, v, buffer, out, lse, len(token), grad_dtype, plan=plan
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
    monkeypatch.setattr(sdpa, "select", lambda *tensors: "cudnn")


@pytest.mark.usefixtures("cudnn", "h100")
def test_auto_is_near_the_faster_plan_at_every_measured_shape(device):
    """Both were timed in one run; what "auto" loses is at most 8%, and 0.4% on average."""
    cases = json.loads((MEASUREMENTS / "h100_plans.json").read_text())["cases"]
    assert len(cases) == 102
    losses = []
    for case in cases:
        T, G, D, causal = (case[name] for name in ("T", "G", "D", "causal"))
        sizes = {name: case[name] for name in "BTHGD"} | dict(S=T, DV=D)
        p = causal_problem(**sizes, right=0 if causal else None)
        assert p.flops == (2 if causal else 4) * case["B"] * T**2 * G * case["H"] * D
        two_kernels = tuning.forward_two_kernels(torch.device("cpu"), torch.bfloat16, G, D, D, True)
        q_k_v = tensors(device)
        plans = dict(
            forward=forward_plan("auto", p, *q_k_v, two_kernels),
            backward=backward_plan("auto", p, *q_k_v, None),
        )
        rows = {row["contender"]: row for row in case["rows"]}
        for part, plan in plans.items():
            fused, split = (rows[f"moda, {name}"][f"{part}_ms"] for name in ("fused", "split"))
            losses.append((split if plan.library else fused) / min(fused, split))
    assert max(losses) < 1.08
    assert statistics.mean(losses) < 1.004


@pytest.mark.usefixtures("cudnn")
def test_auto_leaves_the_overlap_of_large_groups_and_short_sequences_alone(device):
    """The rows of docs/performance.md, and of lists in docs/measurements/attempts.json."""
    for sizes, two_kernels, splits in (
        (dict(), False, (True, True)),
        (dict(G=2), False, (False, True)),
        (dict(T=4096), False, (False, True)),
        (dict(T=4096, G=2), False, (False, False)),
        (dict(T=4096, D=128), False, (True, True)),
        (dict(T=2048, D=128), False, (False, True)),
        (dict(B=8, T=2048, G=3, H=4), True, (False, False)),  # 4% to be gained in forward
        (dict(B=8, T=2048, G=5, H=4), True, (True, False)),  # 9%
        (dict(T=4096, G=7, H=4), True, (False, False)),
        (dict(T=4096, G=12, H=4), True, (True, True)),
        (dict(T=2048, G=6, H=4, D=128), True, (False, True)),  # 4%
        (dict(T=2048, G=7, H=4, D=128), True, (True, True)),  # 5%
    ):
        p = causal_problem(**(dict(T=16384, D=64) | sizes))
        p = p._replace(S=p.T, DV=p.D)
        q_k_v = tensors(device)
        got = forward_plan("auto", p, *q_k_v, two_kernels), backward_plan("auto", p, *q_k_v, None)
        assert tuple(plan.library is not None for plan in got) == splits, sizes


@pytest.mark.parametrize(("G", "L", "two_kernels"), [(3, 2, True), (2, 2, False), (3, 0, False)])
def test_the_forward_says_whether_it_is_two_kernels(G, L, two_kernels, device, monkeypatch):
    told = []

    def plan(*arguments):
        told.append(arguments[-1])
        return forward_plan("fused", *arguments[1:])

    monkeypatch.setattr(operators, "forward_plan", plan)
    inputs = make_inputs(1, 5, G, 1, 16, L, device=device)
    moda_kernels.attention(*inputs, 0.25, None, 0, None)
    assert told == [two_kernels]


def test_auto_splits_for_cudnn_alone(device, monkeypatch):
    p, q_k_v = causal_problem(), tensors(device)
    monkeypatch.setattr(sdpa, "select", lambda *tensors: "flash")
    reason = "flash has not been measured to be faster"
    assert forward_plan("auto", p, *q_k_v, False) == (None, reason)
    assert backward_plan("auto", p, *q_k_v, None) == (None, reason)
    assert forward_plan("split", p, *q_k_v, False) == ("flash", "flash covers it")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(softcap=5.0), "a library has no softcap"),
        (dict(left=7), "a library has no window"),
        (dict(right=7), "a library has no window"),
        (dict(scale=0.0), "a library's mask needs a positive scale"),
        (dict(scale=-0.5), "a library's mask needs a positive scale"),
        (dict(T=8192), "a library's causal mask needs T = S, got T = 8192 and S = 16384"),
    ],
)
def test_what_no_library_covers_is_fused(changes, reason, device):
    p, q_k_v = causal_problem(**changes), tensors(device)
    assert forward_plan("auto", p, *q_k_v, False) == (None, reason)
    assert backward_plan("split", p, *q_k_v, None) == (None, reason)
    assert forward_plan("fused", p, *q_k_v, False).library is None
    with pytest.raises(
        ValueError, match="plan must be 'auto' or 'fused' for this call, got 'split'"
    ):
        forward_plan("split", p, *q_k_v, False)


def test_backward_is_fused_where_only_forward_is_covered(device, monkeypatch):
    p, q_k_v = causal_problem(), tensors(device)
    assert backward_plan("split", p, *q_k_v, None).library is not None
    assert backward_plan("split", p, *q_k_v, q_k_v[0]).library is None
    wide = backward_plan("split", p._replace(G=64, D=256, DV=256), *q_k_v, None)
    assert wide == (None, "at this head dim a group of 64 goes by in parts")
    assert forward_plan("split", p, *q_k_v, False).library is not None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "deterministic" in backward_plan("split", p, *q_k_v, None).reason


@pytest.mark.gpu
def test_libraries_want_16_bit_dtypes_and_aligned_rows():
    p = causal_problem()
    assert forward_plan("auto", p, *tensors("cuda"), False).library is not None
    for q_k_v in (tensors("cuda", torch.float32), tensors("cuda", offset=1)):
        reason = "no library takes tensors of this dtype, head dim or alignment"
        assert forward_plan("auto", p, *q_k_v, False) == (None, reason)
