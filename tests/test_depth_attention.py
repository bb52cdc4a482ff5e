"""Attention over depth alone: values, torch.ops.moda.depth_attention to PyTorch, errors."""

import pytest
import torch

import moda_reference
from helpers import FORMS, Inputs, assert_matches_reference, make_inputs
from moda_ops import moda_depth_attention
from moda_ops.operators import definition as ops

PACKED = torch.zeros(2, 5, 3, 2, 16)
SLOT = PACKED[:, :, 0]


def depth_arguments(inputs: Inputs):
    """For ``moda_depth_attention``: no sequence, and a packed tensor by itself."""
    q, _, _, k_depth, v_depth = inputs
    packed = len(k_depth) == 1 and k_depth[0].dim() == 5
    return (q, k_depth[0], v_depth[0]) if packed else (q, k_depth, v_depth)


def run_depth(attention=moda_depth_attention, **options):
    """``assert_matches_reference``'s run, for inputs with S = 0."""

    def run(inputs, dout, dlse):
        leaves = inputs.map(lambda x: x.detach().requires_grad_())
        out, lse = attention(*depth_arguments(leaves), return_lse=True, **options)
        needed = [leaves.q, *leaves.k_depth, *leaves.v_depth]
        dq, *depth = torch.autograd.grad([out, lse], needed, [dout, dlse])
        n = len(inputs.k_depth)
        return (
            out.detach(),
            lse.detach(),
            Inputs(dq, inputs.k, inputs.v, depth[:n], depth[n:]),
        )

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": 0.2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_reference(dtype, options, form, device):
    inputs = make_inputs(2, 13, 6, 2, 20, 4, S=0, DV=12, dtype=dtype, device=device, form=form)
    assert_matches_reference(inputs, run_depth(**options), **options)


def test_the_reference_of_these_tests_is_that_of_depth():
    q, k, v, k_depth, v_depth = make_inputs(2, 5, 6, 2, 8, 3, S=0, DV=4).numpy()
    expected = moda_reference.depth_attention(q, k_depth, v_depth)
    for a, b in zip(
        moda_reference.attention(q, k, v, k_depth, v_depth, causal=False), expected, strict=True
    ):
        assert (a == b).all()


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_slots(form, dtype, device):
    inputs = make_inputs(2, 5, 6, 2, 8, 0, S=0, dtype=dtype, device=device, form=form)
    q, *depth = depth_arguments(inputs)
    q.requires_grad_()
    out, lse = moda_depth_attention(q, *depth, return_lse=True)
    assert (out.shape, out.dtype, lse.dtype) == (q.shape, dtype, torch.float32)
    assert not out.any() and (lse == float("-inf")).all()
    assert not torch.autograd.grad(out.sum(), q)[0].any()


@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
def test_empty_batch_and_sequence(B, T, device):
    inputs = make_inputs(B, T, 2, 1, 16, 2, S=0, DV=24, device=device)
    out, lse, grads = run_depth()(
        inputs, torch.zeros(B, T, 2, 24, device=device), torch.zeros(B, 2, T, device=device)
    )
    assert out.shape == (B, T, 2, 24) and lse.shape == (B, 2, T)
    assert [g.shape for g in grads.leaves()] == [x.shape for x in inputs.leaves()]


CASES = [
    (dict(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
    (dict(q=PACKED), ValueError, "q must have shape (B, T, HQ, D), got (2, 5, 3, 2, 16)"),
    (
        dict(q=torch.zeros(2, 5, 3, 16)),
        ValueError,
        "q's heads must be a positive multiple of k_depth's, got HQ = 3 and H = 2; "
        "heads are the second to last dimension",
    ),
    (
        dict(q=torch.zeros(2, 5, 16, 6).mT),
        ValueError,
        "q must be contiguous in its last dimension (stride 1), got strides (480, 96, 1, 6); call "
        ".contiguous() if a copy is acceptable",
    ),
    (
        dict(k_depth=[SLOT.half()] * 3),
        TypeError,
        "k_depth[0] must have dtype torch.float32 to fit q, got torch.float16",
    ),
    (
        dict(v_depth=[SLOT] * 2),
        ValueError,
        "k_depth and v_depth must have the same number of slots, got 3 and 2",
    ),
    (
        dict(v_depth=[SLOT, SLOT[:1], SLOT]),
        ValueError,
        "v_depth[1] must have shape (B, T, H, DV) = (2, 5, 2, 16), got (1, 5, 2, 16)",
    ),
    (
        dict(k_depth=PACKED[:, :4], v_depth=PACKED),
        ValueError,
        "k_depth must have shape (B, T, L, H, D) = (2, 5, 3, 2, 16), got (2, 4, 3, 2, 16)",
    ),
    (
        dict(k_depth=SLOT),
        ValueError,
        "k_depth given as one tensor must be packed, (B, T, L, H, D), got 4 dimensions "
        "(2, 5, 2, 16); a single slot goes in a list",
    ),
    (
        dict(k_depth=None),
        ValueError,
        "v_depth is given but k_depth is None; give both or neither",
    ),
    (
        dict(v_depth=[torch.zeros(2, 5, 2, 300)] * 3),
        ValueError,
        "v_depth's head dim must be within 1..256, got 300",
    ),
    (dict(scale="1"), TypeError, "scale must be a number or None, got '1'"),
    (dict(scale=float("inf")), ValueError, "scale must be within -1e+30..1e+30, got inf"),
    (dict(softcap=-1.0), ValueError, "softcap must be within 1e-07..1e+30, got -1.0"),
    (dict(return_lse=1), TypeError, "return_lse must be a bool, got 1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_errors(changes, error, message):
    right = dict(q=torch.zeros(2, 5, 6, 16), k_depth=[SLOT] * 3, v_depth=[SLOT] * 3)
    assert moda_depth_attention(**right).shape == (2, 5, 6, 16)
    with pytest.raises(error) as caught:
        moda_depth_attention(**(right | changes))
    assert str(caught.value) == message


def test_operators_check_their_own_arguments():
    q = torch.zeros(2, 5, 6, 16)
    out, lse = torch.ops.moda.depth_attention(q, [SLOT], [SLOT])
    with pytest.raises(ValueError, match=r"k_depth\[0\] must have shape \(B, T, H, D\)"):
        torch.ops.moda.depth_attention(q, [SLOT[0, 0, 0]], [SLOT])
    with pytest.raises(ValueError, match=r"lse must have shape \(B, HQ, T\) = \(2, 6, 5\)"):
        torch.ops.moda.depth_attention_backward(out, None, q, [SLOT], [SLOT], out, lse.mT)


@pytest.mark.parametrize("L", [0, 3])
@pytest.mark.parametrize("form", ["list", "packed"])
def test_kernels_behind_the_operator(form, L, device, monkeypatch):
    """What CUDA tensors get, by the interpreter where there is no GPU."""
    import moda_kernels

    monkeypatch.setattr(ops, "implementation", lambda q: moda_kernels)
    inputs = make_inputs(2, 5, 6, 2, 20, L, S=0, DV=12, device=device, form=form)
    if form == "list" and L == 0:
        inputs = inputs._replace(v=inputs.v.new_empty(2, 0, 2, 20))  # DV = D
        assert moda_depth_attention(*depth_arguments(inputs)).shape == inputs.q.shape
        return
    assert_matches_reference(inputs, run_depth())
