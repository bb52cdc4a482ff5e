"""Depth shared within chunks: values, torch.ops.moda.chunk_attention to PyTorch, errors."""

import pytest
import torch

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


@pytest.mark.parametrize(
    ("options", "form"), list(zip(OPTIONS, ["list", "packed"] * 2, strict=True)), ids=str
)
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
