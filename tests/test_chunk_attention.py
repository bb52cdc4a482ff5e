"""Depth shared within chunks: values, torch.ops.moda.chunk_attention to PyTorch, errors."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import FORMS, assert_matches_reference, make_inputs
from moda_ops import moda_chunk_attention
from moda_ops.operators import definition as ops
from test_ops import run_public

OPTIONS = [
    {"chunk_size": 1},
    {"chunk_size": 4, "softcap": 2.0},
    {"chunk_size": 5, "window": (3, 1)},
    {"chunk_size": 100, "scale": 0.2},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_reference(dtype, options, form, device):
    inputs = make_inputs(2, 13, 6, 2, 20, 4, S=17, DV=12, dtype=dtype, device=device, form=form)
    assert_matches_reference(inputs, run_public(moda_chunk_attention, **options), **options)


@pytest.mark.parametrize(("B", "T", "S", "L"), [(0, 4, 3, 2), (2, 0, 3, 2), (2, 5, 5, 0)])
def test_nothing_to_chunk(B, T, S, L, device):
    inputs = make_inputs(B, T, 2, 1, 16, L, S=S, DV=24, device=device)
    options = {"chunk_size": 3}
    assert_matches_reference(inputs, run_public(moda_chunk_attention, **options), **options)


@pytest.mark.parametrize("form", ["list", "packed"])
def test_gradcheck(form):
    inputs = make_inputs(1, 5, 4, 2, 3, 2, S=6, DV=2, dtype=torch.float64, form=form)
    leaves = [x.requires_grad_() for x in inputs.leaves()]
    n, options = len(inputs.k_depth), dict(chunk_size=3, softcap=1.5, window_left=2)

    def f(q, k, v, *depth):
        return torch.ops.moda.chunk_attention(q, k, v, depth[:n], depth[n:], **options)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, grad, device):
    inputs = make_inputs(2, 5, 4, 2, 16, 3, S=7, DV=24, device=device, form=form)
    inputs = inputs.map(lambda x: x.requires_grad_(grad))
    options = {"scale": 0.3, "window_left": 4, "softcap": 5.0}
    for kwargs in ({"chunk_size": 2}, {"chunk_size": 9, **options}):
        torch.library.opcheck(torch.ops.moda.chunk_attention.default, tuple(inputs), kwargs)
    detached = inputs.map(torch.Tensor.detach)
    out, lse = torch.ops.moda.chunk_attention(*detached, chunk_size=2)
    for dlse in (None, torch.randn_like(lse)):
        args = (torch.randn_like(out), dlse, *detached, out, lse)
        kwargs = {"chunk_size": 2}
        torch.library.opcheck(torch.ops.moda.chunk_attention_backward.default, args, kwargs)


def test_no_second_derivative(device):
    q = torch.randn(1, 3, 1, 16, device=device, requires_grad=True)
    x = q.detach()
    loss = moda_chunk_attention(q, x, x, [x], [x], 2).sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(NotImplementedError, match="moda::chunk_attention has no second derivative"):
        grad.sum().backward()


FIRST_CALL = """
import torch, moda_ops
def attend(q, d):
    return moda_ops.moda_chunk_attention(q, d[0], d[1], d, d, 2)
q, *d = (torch.randn(1, 5, 2, 16, device="{device}", requires_grad=True) for _ in range(3))
out = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, d)
out.sum().backward()
torch.testing.assert_close(out, attend(q, d))
assert q.grad.isfinite().all() and d[1].grad.isfinite().all()
print("compiled")
"""


def test_first_call_may_be_compiled(device):
    code = FIRST_CALL.format(device=device)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.stdout == "compiled\n", result.stderr


@pytest.mark.parametrize("form", ["list", "packed"])
def test_one_graph_serves_several_lengths(form, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moda_chunk_attention, dynamic=True, fullgraph=True, backend=counter)
    for T, chunk_size in ((19, 4), (23, 7), (64, 100)):
        inputs = make_inputs(3, T, 4, 2, 16, 5, device=device, form=form, seed=T)
        run = run_public(compiled, chunk_size=chunk_size)
        assert_matches_reference(inputs, run, chunk_size=chunk_size)
    assert counter.frame_count == 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["list", "packed"])
def test_kernels_behind_the_operator(form, options, device, monkeypatch):
    """What CUDA tensors get, by the interpreter where there is no GPU."""
    import moda_kernels

    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)
    inputs = make_inputs(2, 13, 6, 2, 20, 3, S=17, DV=12, device=device, form=form)
    assert_matches_reference(inputs, run_public(moda_chunk_attention, **options), **options)


Q, K = torch.zeros(2, 5, 6, 16), torch.zeros(2, 7, 2, 16)
SLOT = K[:, :5]
CASES = [
    (dict(chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
    (dict(chunk_size=1.5), TypeError, "chunk_size must be an int, got 1.5"),
    (dict(chunk_size=True), TypeError, "chunk_size must be an int, got True"),
    (dict(k=None), TypeError, "k must be a torch.Tensor, got NoneType"),
    (
        dict(k_depth=[K]),
        ValueError,
        "k_depth[0] must have shape (B, T, H, D) = (2, 5, 2, 16), got (2, 7, 2, 16)",
    ),
    (
        dict(v_depth=None),
        ValueError,
        "k_depth is given but v_depth is None; give both or neither",
    ),
    (
        dict(v_depth=[SLOT, SLOT]),
        ValueError,
        "k_depth and v_depth must have the same number of slots, got 1 and 2",
    ),
    (dict(window=-1), ValueError, "window sides must be >= 0 (None is unbounded), got -1"),
    (dict(scale="1"), TypeError, "scale must be a number or None, got '1'"),
    (dict(softcap=0.0), ValueError, "softcap must be within 1e-07..1e+30, got 0.0"),
    (dict(return_lse=None), TypeError, "return_lse must be a bool, got None"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_errors(changes, error, message):
    right = dict(q=Q, k=K, v=K, k_depth=[SLOT], v_depth=[SLOT], chunk_size=2)
    assert moda_chunk_attention(**right).shape == Q.shape
    with pytest.raises(error) as caught:
        moda_chunk_attention(**(right | changes))
    assert str(caught.value) == message


def test_operators_check_their_own_arguments():
    out, lse = torch.ops.moda.chunk_attention(Q, K, K, [SLOT], [SLOT], chunk_size=2)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        torch.ops.moda.chunk_attention(Q, K, K, [SLOT], [SLOT], chunk_size=0)
    backward = torch.ops.moda.chunk_attention_backward
    arguments = Q, K, K, [SLOT], [SLOT], out
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got -3"):
        backward(out, None, *arguments, lse, chunk_size=-3)
    with pytest.raises(ValueError, match=r"lse must have shape \(B, HQ, T\) = \(2, 6, 5\)"):
        backward(out, None, *arguments, lse.mT, chunk_size=2)
