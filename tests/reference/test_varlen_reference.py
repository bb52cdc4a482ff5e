"""Packed documents in the specification: each is attention of its own."""

import numpy as np
import pytest

from moda_reference import (
    attention,
    attention_backward,
    attention_varlen,
    attention_varlen_backward,
)

STARTS, KEY_STARTS = [0, 3, 3, 8], [0, 5, 7, 9]


def inputs(packed, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(8, 4, 3)), rng.normal(size=(9, 2, 3)), rng.normal(size=(9, 2, 5))
    k_depth, v_depth = rng.normal(size=(8, 2, 2, 3)), rng.normal(size=(8, 2, 2, 5))
    if not packed:
        k_depth, v_depth = ([x[:, 0], x[:, 1]] for x in (k_depth, v_depth))
    return q, k, v, k_depth, v_depth


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, dict(causal=False, window=(1, 2), softcap=0.8)])
def test_documents_are_alone(packed, options):
    q, k, v, k_depth, v_depth = arrays = inputs(packed)
    rng = np.random.default_rng(1)
    dout, dlse = rng.normal(size=(8, 4, 5)), rng.normal(size=(4, 8))
    out, lse = attention_varlen(*arrays, STARTS, KEY_STARTS, **options)
    grads = attention_varlen_backward(dout, *arrays, STARTS, KEY_STARTS, dlse=dlse, **options)
    for t, s in ((slice(0, 3), slice(0, 5)), (slice(3, 8), slice(7, 9))):
        depth = [x[None, t] if packed else [y[None, t] for y in x] for x in (k_depth, v_depth)]
        alone = q[None, t], k[None, s], v[None, s], *depth
        for actual, expected in zip(
            (out[None, t], lse[None, :, t]), attention(*alone, **options), strict=True
        ):
            np.testing.assert_array_equal(actual, expected)
        exact = attention_backward(dout[None, t], *alone, dlse=dlse[None, :, t], **options)
        np.testing.assert_array_equal(grads.dq[None, t], exact.dq)
        np.testing.assert_array_equal(grads.dk[None, s], exact.dk)
        np.testing.assert_array_equal(grads.dv[None, s], exact.dv)
        for actual, expected in zip(
            (grads.dk_depth, grads.dv_depth), (exact.dk_depth, exact.dv_depth), strict=True
        ):
            for a, e in zip(*([x] if packed else x for x in (actual, expected)), strict=True):
                np.testing.assert_array_equal(a[None, t], e)
    assert not grads.dk[5:7].any() and not grads.dv[5:7].any()  # keys of a document of no queries


def test_without_depth():
    q, k, v, _, _ = inputs(True)
    out, lse = attention_varlen(q, k, v, None, None, STARTS, KEY_STARTS)
    assert (out.shape, lse.shape) == ((8, 4, 5), (4, 8))
    grads = attention_varlen_backward(out, q, k, v, None, None, STARTS, KEY_STARTS)
    assert grads.dk_depth is None


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        ([0, 3, 2, 8], ValueError, "q must go from 0 to 8 and never fall, got [0, 3, 2, 8]"),
        ([0, 3, 3, 7], ValueError, "q must go from 0 to 8 and never fall, got [0, 3, 3, 7]"),
        ([0, 8], ValueError, "q and cu_seqlens_k must have the same length, got 2 and 4"),
        ([0.0, 8.0], TypeError, "q must be a list of integers, got float64 in 1 axes"),
    ],
)
def test_errors(starts, error, message):
    with pytest.raises(error) as caught:
        attention_varlen(*inputs(True), starts, KEY_STARTS)
    assert str(caught.value) == f"cu_seqlens_{message}"
