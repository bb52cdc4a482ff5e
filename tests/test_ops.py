"""torch.ops.moda.* as PyTorch sees them: schemas, fakes, autograd, compile, export."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import FORMS, Inputs, assert_matches_reference, make_inputs
from moda_ops import moda_attention


def as_arguments(inputs: Inputs):
    """For ``moda_attention``: a packed tensor by itself."""
    q, k, v, k_depth, v_depth = inputs
    packed = len(k_depth) == 1 and k_depth[0].dim() == 5
    return (q, k, v, k_depth[0], v_depth[0]) if packed else inputs


def run_public(attention=moda_attention, **options):
    def run(inputs, dout, dlse):
        leaves = inputs.map(lambda x: x.detach().requires_grad_())
        out, lse = attention(*as_arguments(leaves), return_lse=True, **options)
        grads = torch.autograd.grad(
            [out, lse], leaves.leaves(), [dout, dlse], materialize_grads=True
        )
        n = len(inputs.k_depth)
        return (
            out.detach(),
            lse.detach(),
            Inputs(*grads[:3], list(grads[3 : 3 + n]), list(grads[3 + n :])),
        )

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "softcap": 2.0},
        {"window": (5, 2), "causal": False},
        {"window": 4, "scale": 0.2},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_reference(dtype, options, form, device):
    inputs = make_inputs(2, 13, 6, 2, 20, 4, S=17, DV=12, dtype=dtype, device=device, form=form)
    assert_matches_reference(inputs, run_public(**options), **options)


def test_strides_of_what_is_empty_do_not_matter(device):
    """``contiguous`` would not change them either."""
    q, k, v = torch.randn(3, 1, 5, 2, 8, device=device)
    nothing = torch.randn(1, 5, 0, 2, 8, 3, device=device)[..., 0]
    assert nothing.contiguous().stride(-1) == 3
    assert torch.equal(moda_attention(q, k, v, nothing, nothing), moda_attention(q, k, v))
    no_keys = q.new_empty(1, 0, 2, 8, 3)[..., 0]
    assert not moda_attention(q, no_keys, no_keys).any()


@pytest.mark.parametrize("L", [0, 1, 3])
@pytest.mark.parametrize("form", ["list", "packed"])
def test_gradcheck(form, L):
    inputs = make_inputs(1, 4, 4, 2, 3, L, S=5, DV=2, dtype=torch.float64, form=form)
    leaves = [x.requires_grad_() for x in inputs.leaves()]
    n = len(inputs.k_depth)

    def f(q, k, v, *depth):
        return torch.ops.moda.attention(q, k, v, depth[:n], depth[n:], softcap=1.5, window_left=2)

    assert torch.autograd.gradcheck(f, leaves)


def opcheck_cases():
    for form in FORMS:
        for grad in (False, True):
            yield pytest.param(form, grad, id=f"{form}-{'grad' if grad else 'no_grad'}")


@pytest.mark.parametrize(("form", "grad"), list(opcheck_cases()))
def test_opcheck(form, grad, device):
    inputs = make_inputs(2, 5, 4, 2, 16, 3, S=7, DV=24, device=device, form=form)
    inputs = inputs.map(lambda x: x.requires_grad_(grad))
    options = {"causal": False, "scale": 0.3, "window_left": 4, "window_right": 1, "softcap": 5.0}
    for kwargs in ({}, options):
        torch.library.opcheck(torch.ops.moda.attention.default, tuple(inputs), kwargs)
    detached = inputs.map(torch.Tensor.detach)
    out, lse = torch.ops.moda.attention(*detached)
    for dlse in (None, torch.randn_like(lse)):
        args = (torch.randn_like(out), dlse, *detached, out, lse)
        torch.library.opcheck(torch.ops.moda.attention_backward.default, args)


def test_gradient_through_one_output_only(device):
    q, k, v, k_depth, v_depth = make_inputs(1, 6, 2, 1, 16, 2, device=device)
    q.requires_grad_()
    out, lse = moda_attention(q, k, v, k_depth, v_depth, return_lse=True)
    both = torch.autograd.grad(out.sum() + lse.sum(), q)[0]
    out_only = torch.autograd.grad(moda_attention(q, k, v, k_depth, v_depth).sum(), q)[0]
    lse_only = torch.autograd.grad(
        moda_attention(q, k, v, k_depth, v_depth, return_lse=True)[1].sum(), q
    )[0]
    assert lse_only.abs().max() > 1e-3 and out_only.abs().max() > 1e-3
    torch.testing.assert_close(out_only + lse_only, both)


def test_tensor_in_both_key_sets_gets_both_gradients(device):
    """k as sequence key and as depth slot, as models use it, eager and compiled."""
    q, k, v, _, _ = make_inputs(1, 6, 2, 1, 16, 0, device=device)
    v2 = torch.randn_like(v)

    def loss(k, slot):
        return moda_attention(q, k, v, [slot], [v2]).square().sum()

    a, b = k.clone().requires_grad_(), k.clone().requires_grad_()
    expected = sum(torch.autograd.grad(loss(a, b), (a, b)))
    compiled = torch.compile(lambda k: loss(k, k), backend="aot_eager", fullgraph=True)
    for f in (lambda k: loss(k, k), compiled):
        shared = k.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(f(shared), shared)[0], expected)


def test_autocast_does_not_reach_inside(device):
    inputs = make_inputs(1, 9, 4, 2, 16, 2, dtype=torch.bfloat16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert_matches_reference(inputs, run_public())


def test_no_second_derivative(device):
    q, k, v, _, _ = make_inputs(1, 3, 1, 1, 16, 0, device=device)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(moda_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


FIRST_CALL = """
import torch, moda_ops
f = torch.compile(
    lambda q, k, v, d: moda_ops.moda_attention(q, k, v, d, d), fullgraph=True, backend="aot_eager"
)
q, k, v, d = (torch.randn(1, 5, 2, 16, device="{device}", requires_grad=True) for _ in range(4))
out = f(q, k, v, [d])
out.sum().backward()
eager = moda_ops.moda_attention(q, k, v, [d], [d])
torch.testing.assert_close(out, eager)
assert q.grad.isfinite().all() and d.grad.isfinite().all()
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
    compiled = torch.compile(moda_attention, dynamic=True, fullgraph=True, backend=counter)
    for T in (19, 23, 64):  # dynamic shapes take sizes that start out equal for equal forever
        inputs = make_inputs(3, T, 4, 2, 16, 5, device=device, form=form, seed=T)
        assert_matches_reference(inputs, run_public(compiled))
    assert counter.frame_count == 1


def test_inductor(device):
    torch._dynamo.reset()
    inputs = make_inputs(2, 9, 4, 2, 16, 3, device=device)
    compiled = torch.compile(moda_attention, fullgraph=True)
    assert_matches_reference(inputs, run_public(compiled))


def test_export_round_trip(tmp_path, device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, k_depth, v_depth):
            return moda_attention(q, k, v, k_depth, v_depth, return_lse=True)

    inputs = make_inputs(2, 9, 4, 2, 16, 3, device=device)
    T = torch.export.Dim("T", min=2, max=64)
    shapes = ({1: T}, {1: T}, {1: T}, [{1: T}] * 3, [{1: T}] * 3)
    torch.export.save(
        torch.export.export(Module(), tuple(inputs), dynamic_shapes=shapes), tmp_path / "moda.pt2"
    )
    loaded = torch.export.load(tmp_path / "moda.pt2").module()
    for t in (9, 21):
        inputs = make_inputs(2, t, 4, 2, 16, 3, device=device, seed=t)
        for a, b in zip(loaded(*inputs), Module()(*inputs), strict=True):
            assert torch.equal(a, b)


def test_inputs_survive_an_error(device):
    inputs = make_inputs(1, 5, 2, 1, 16, 2, device=device)
    copies = inputs.map(torch.clone)
    with pytest.raises(ValueError, match="v_depth"):
        moda_attention(*inputs._replace(v_depth=inputs.v_depth[:1]))
    for a, b in zip(inputs.leaves(), copies.leaves(), strict=True):
        assert torch.equal(a, b)
