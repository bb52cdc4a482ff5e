"""Depth alone: its equation, its gradient by differences, and errors that name the argument."""

import re

import numpy as np
import pytest
from test_finite_differences import central_differences

from moda_reference import attention, depth_attention, depth_attention_backward


@pytest.mark.parametrize("form", ["list", "packed"])
def test_is_a_softmax_over_the_slots_of_a_token(form, make_inputs, assert_same):
    x = make_inputs(B=2, T=3, H=2, G=3, L=4)
    q, k_depth, v_depth = x["q"], x["k_depth"], x["v_depth"]
    depth = [k_depth, v_depth]
    if form == "list":
        depth = [list(np.moveaxis(x, 2, 0)) for x in depth]
    out, lse = depth_attention(q, *depth, scale=0.7)
    for b, t, h in np.ndindex(2, 3, 6):
        weights = np.exp(0.7 * k_depth[b, t, :, h // 3] @ q[b, t, h])
        assert_same(lse[b, h, t], np.log(weights.sum()))
        assert_same(out[b, t, h], weights @ v_depth[b, t, :, h // 3] / weights.sum())


def test_merges_with_the_sequence_by_lse(make_inputs, assert_same):
    x = make_inputs(L=3)
    q, k, v, k_depth, v_depth = x.values()
    parts = attention(q, k, v), depth_attention(q, k_depth, v_depth)
    lse = np.logaddexp(parts[0][1], parts[1][1])
    out = sum(out * np.exp(part - lse).swapaxes(1, 2)[..., None] for out, part in parts)
    assert_same((out, lse), attention(**x))


@pytest.mark.parametrize("options", [{}, {"softcap": 0.8}, {"scale": -0.3}], ids=str)
def test_gradient(options, make_inputs):
    x = make_inputs(B=1, T=3, G=2, D=3, DV=2, L=2)
    q, _, _, k_depth, v_depth = x.values()
    out, lse = depth_attention(q, k_depth, v_depth)
    rng = np.random.default_rng(2)
    dout, dlse = rng.normal(size=out.shape), rng.normal(size=lse.shape)

    def scalar() -> float:
        out, lse = depth_attention(q, k_depth, v_depth, **options)
        return float((dout * out).sum() + (dlse * lse).sum())

    grads = depth_attention_backward(dout, q, k_depth, v_depth, dlse=dlse, **options)
    assert grads.dk.size == grads.dv.size == 0
    for array, gradient in ((q, grads.dq), (k_depth, grads.dk_depth), (v_depth, grads.dv_depth)):
        expected = central_differences(scalar, array)
        np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("depth", [None, [], np.zeros((2, 5, 0, 2, 4))], ids=["None", "[]", "0"])
def test_without_slots(depth, make_inputs):
    q = make_inputs(B=2, T=5, H=2, G=3, D=4)["q"]
    out, lse = depth_attention(q, depth, depth)
    assert out.shape == (2, 5, 6, 4) and not out.any()
    assert (lse == -np.inf).all()
    assert not depth_attention_backward(out + 1, q, depth, depth).dq.any()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(q=np.zeros((5, 6, 4))), "q has shape (5, 6, 4), it must be (B, T, HQ, D)"),
        (dict(k_depth=None), "k_depth is None, but v_depth is given; give both or neither"),
        (
            dict(v_depth=[np.zeros((2, 4, 2, 3))]),
            "v_depth[0] has shape (2, 4, 2, 3), it must be (B=2, T=5, H=2, DV=3)",
        ),
        (dict(k_depth=[np.zeros(4)]), "k_depth[0] has shape (4,), it must be (B=2, T=5, H=6, D=4)"),
        (dict(softcap=0), "softcap must be None or a finite number > 0, got 0"),
    ],
)
def test_errors(changes, text):
    right = dict(
        q=np.zeros((2, 5, 6, 4)), k_depth=[np.zeros((2, 5, 2, 4))], v_depth=[np.zeros((2, 5, 2, 3))]
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        depth_attention(**(right | changes))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        depth_attention_backward(np.zeros((2, 5, 6, 3)), **(right | changes))
