"""Depth mass and sink mass: their equations, and errors that name the argument."""

import numpy as np
import pytest

from moda_reference import attention, depth_mass, sink_mass, visible


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "softcap": 0.8}], ids=str)
@pytest.mark.parametrize("form", ["list", "packed"])
def test_by_the_equation(form, options, make_inputs):
    x = make_inputs(B=2, T=4, H=2, G=3, L=3)
    q, k, _, k_depth, _ = x.values()
    _, lse = attention(**x, **options, window=2)
    scale, cap = options.get("scale", q.shape[-1] ** -0.5), options.get("softcap")
    capped = (lambda score: score) if cap is None else (lambda score: cap * np.tanh(score / cap))
    expected, sinks = np.zeros((2, 6, 3)), np.zeros((2, 6))
    for b, t, h in np.ndindex(2, 4, 6):
        for l in range(3):
            score = capped(scale * q[b, t, h] @ k_depth[b, t, l, h // 3])
            expected[b, h, l] += np.exp(score - lse[b, h, t]) / 4
        for n in np.flatnonzero(visible(4, k.shape[1], window=2)[t][:2]):
            score = capped(scale * q[b, t, h] @ k[b, n, h // 3])
            sinks[b, h] += np.exp(score - lse[b, h, t]) / 4
    depth = list(np.moveaxis(k_depth, 2, 0)) if form == "list" else k_depth
    np.testing.assert_allclose(depth_mass(q, depth, lse, **options), expected, rtol=1e-12)
    actual = sink_mass(q, k, lse, keys=2, window=2, **options)
    np.testing.assert_allclose(actual, sinks, rtol=1e-12)


def test_depth_and_sequence_together_have_all(make_inputs):
    x = make_inputs(L=3)
    _, lse = attention(**x)
    total = depth_mass(x["q"], x["k_depth"], lse).sum(-1) + sink_mass(x["q"], x["k"], lse, keys=99)
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_tokens_that_saw_nothing_add_nothing(make_inputs):
    x = make_inputs(T=4, L=1)
    q, depth = x["q"], x["k_depth"]
    lse = np.zeros((*q.shape[:1], q.shape[2], 4))
    lse[..., 1:] = -np.inf
    expected = depth_mass(q[:, :1], depth[:, :1], lse[..., :1]) / 4
    np.testing.assert_allclose(depth_mass(q, depth, lse), expected, rtol=1e-12)


def test_errors():
    q, slot, lse = np.zeros((2, 5, 6, 4)), np.zeros((2, 5, 2, 4)), np.zeros((2, 6, 5))
    assert depth_mass(q, [slot], lse).shape == (2, 6, 1)
    assert depth_mass(q, None, lse).shape == (2, 6, 0)
    with pytest.raises(ValueError, match=r"^lse has shape \(2, 5, 6\), it must be \(B=2, HQ"):
        depth_mass(q, [slot], lse.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"^q has shape \(5, 6, 4\), it must be \(B, T, HQ, D\)"):
        depth_mass(q[0], [slot], lse)
    with pytest.raises(ValueError, match=r"^keys must be an integer >= 1, got 0"):
        sink_mass(q, slot, lse, keys=0)
