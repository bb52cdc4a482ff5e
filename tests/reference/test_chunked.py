"""Depth shared within chunks: from its definition, its limits, its gradient, and its errors."""

import re

import numpy as np
import pytest
from test_finite_differences import central_differences

from moda_reference import (
    attention,
    attention_backward,
    chunk_attention,
    chunk_attention_backward,
    chunk_visible,
)


@pytest.mark.parametrize("form", ["list", "packed"])
@pytest.mark.parametrize("options", [{}, {"window": 2, "softcap": 0.9}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_each_token_attends_to_the_slots_it_sees(
    chunk_size, options, form, make_inputs, assert_same
):
    T, S, L = 7, 9, 2
    x = make_inputs(T=T, S=S, L=L)
    q, k, v, k_depth, v_depth = x.values()
    if form == "list":
        x |= {name: list(np.moveaxis(x[name], 2, 0)) for name in ("k_depth", "v_depth")}
    out, lse = chunk_attention(**x, chunk_size=chunk_size, **options)
    for t in range(T):
        last = t + S - T + 1  # keys of the sequence that t may see
        seen = range(t // chunk_size * chunk_size, t + 1)
        depth = ([a[:, s : s + 1, l] for s in seen for l in range(L)] for a in (k_depth, v_depth))
        expected = attention(q[:, t : t + 1], k[:, :last], v[:, :last], *depth, **options)
        assert_same((out[:, t : t + 1], lse[:, :, t : t + 1]), expected)


def test_chunks_of_one_token_are_plain_attention(make_inputs, assert_same):
    x = make_inputs(T=5, S=8, L=3)
    assert_same(chunk_attention(**x, chunk_size=1), attention(**x))
    dout = np.ones_like(attention(**x)[0])
    expected = attention_backward(dout, **x)
    assert_same(chunk_attention_backward(dout, **x, chunk_size=1), expected)


def test_without_depth_chunks_do_not_matter(make_inputs, assert_same):
    x = make_inputs(L=0)
    assert_same(chunk_attention(**x, chunk_size=3), attention(**x))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 9])
def test_mask_from_its_definition(chunk_size):
    for t, s in np.ndindex(7, 7):
        same = t // chunk_size == s // chunk_size
        assert chunk_visible(7, chunk_size)[t, s] == (same and s <= t)


@pytest.mark.parametrize("lse_only", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        {"chunk_size": 2},
        {"chunk_size": 3, "softcap": 0.8, "S": 6},
        {"chunk_size": 9, "window": 1, "scale": -0.3},
    ],
    ids=str,
)
def test_gradient(case, lse_only, make_inputs):
    options = {name: case[name] for name in case if name.islower()}
    inputs = make_inputs(B=1, T=5, S=case.get("S"), H=2, G=2, D=3, DV=2, L=2)
    out, lse = chunk_attention(**inputs, **options)
    rng = np.random.default_rng(2)
    dout = np.zeros_like(out) if lse_only else rng.normal(size=out.shape)
    dlse = rng.normal(size=lse.shape)

    def scalar() -> float:
        out, lse = chunk_attention(**inputs, **options)
        return float((dout * out).sum() + (dlse * lse).sum())

    gradients = chunk_attention_backward(dout, **inputs, dlse=dlse, **options)
    for (name, array), gradient in zip(inputs.items(), gradients, strict=True):
        expected = central_differences(scalar, array)
        np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-8, err_msg=name)


def test_gradients_come_in_the_form_given(make_inputs, assert_same):
    packed = make_inputs(L=3)
    slots = packed | {
        name: list(np.moveaxis(packed[name], 2, 0)) for name in ("k_depth", "v_depth")
    }
    dout = np.ones_like(attention(**packed)[0])
    expected = chunk_attention_backward(dout, **packed, chunk_size=2)
    actual = chunk_attention_backward(dout, **slots, chunk_size=2)
    for a, b in zip(actual[3:], expected[3:], strict=True):
        assert_same(a, list(np.moveaxis(b, 2, 0)), tolerance=0)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (dict(chunk_size=0), ValueError, "chunk_size must be an integer >= 1, got 0"),
        (dict(chunk_size=2.0), TypeError, "chunk_size must be an integer >= 1, got 2.0"),
        (
            dict(q=np.zeros((5, 6, 4))),
            ValueError,
            "q has shape (5, 6, 4), it must be (B, T, HQ, D)",
        ),
    ],
)
def test_errors(changes, error, text, make_inputs):
    arguments = make_inputs() | dict(chunk_size=2) | changes
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        chunk_attention(**arguments)
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        chunk_attention_backward(np.zeros((2, 5, 6, 3)), **arguments)
