"""Loops, whole arrays and tiles are one function; so are the two forms of its gradient."""

import numpy as np
import pytest

from moda_reference import (
    attention,
    attention_backward,
    attention_backward_loops,
    attention_loops,
    attention_tiled,
)

SIZES = [  # B, T, S, H, G, D, DV, L
    (1, 1, 1, 1, 1, 1, 1, 0),
    (2, 5, 5, 2, 3, 4, 7, 1),
    (1, 7, 7, 1, 5, 3, 2, 7),
    (2, 7, 12, 2, 2, 5, 4, 7),  # S > T
    (1, 1, 9, 2, 2, 4, 4, 7),  # one query against a cache
    (1, 7, 4, 2, 1, 4, 6, 0),  # S < T: some rows see nothing
    (1, 7, 4, 2, 1, 4, 6, 1),  # S < T: some rows see depth alone
    (1, 5, 0, 2, 3, 4, 2, 7),  # all rows see depth alone
    (1, 5, 0, 1, 2, 3, 3, 0),  # no row sees anything
    (0, 3, 3, 1, 2, 3, 3, 2),
    (1, 0, 3, 1, 2, 3, 3, 2),
]
MASKS = [  # causal, window
    (True, None),
    (False, None),
    (True, 2),
    (False, 2),
    (False, (0, 3)),
    (False, (1, None)),
    (True, (None, 4)),
]
TILES = [  # block_m, block_n, block_l
    (1, 1, 1),
    (4, 3, 2),
    (7, 2, 5),
    (64, 64, 64),
]

every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
every_mask = pytest.mark.parametrize(("causal", "window"), MASKS)
every_softcap = pytest.mark.parametrize("softcap", [None, 0.7])
every_forward = pytest.mark.parametrize("forward", [attention, attention_loops, attention_tiled])
every_backward = pytest.mark.parametrize("backward", [attention_backward, attention_backward_loops])


@every_size
@every_mask
@every_softcap
def test_forward(sizes, causal, window, softcap, make_inputs, assert_same):
    arguments = make_inputs(*sizes) | {"causal": causal, "window": window, "softcap": softcap}
    expected = attention_loops(**arguments)
    assert_same(attention(**arguments), expected)
    for block_m, block_n, block_l in TILES:
        actual = attention_tiled(**arguments, block_m=block_m, block_n=block_n, block_l=block_l)
        assert_same(actual, expected)


@every_size
@every_mask
@every_softcap
def test_backward(sizes, causal, window, softcap, make_inputs, assert_same):
    arguments = make_inputs(*sizes) | {"causal": causal, "window": window, "softcap": softcap}
    out, lse = attention(**arguments)
    rng = np.random.default_rng(1)
    arguments |= {"dout": rng.normal(size=out.shape), "dlse": rng.normal(size=lse.shape)}
    assert_same(attention_backward(**arguments), attention_backward_loops(**arguments))


@every_forward
def test_rows_that_see_nothing(forward, make_inputs):
    inputs = make_inputs(T=7, S=4, L=0)
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        out, lse = forward(**inputs, causal=True)
    assert (out[:, :3] == 0).all()
    assert (lse[:, :, :3] == -np.inf).all()
    assert np.isfinite(lse[:, :, 3:]).all()


@every_backward
def test_rows_that_see_nothing_have_no_gradient(backward, make_inputs, assert_same):
    inputs = make_inputs(T=7, S=4, L=0)
    out, lse = attention(**inputs)
    dout, dlse = np.ones_like(out), np.ones_like(lse)
    clean = backward(dout, **inputs, dlse=dlse)
    assert (clean.dq[:, :3] == 0).all()

    dout[:, :3] = dlse[:, :, :3] = np.nan
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        assert_same(backward(dout, **inputs, dlse=dlse), clean)


@every_forward
def test_large_scores_do_not_overflow(forward, make_inputs, assert_same):
    inputs = make_inputs()
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        out, lse = forward(**inputs, scale=1e5)
    assert np.isfinite(out).all()
    assert abs(lse).max() > 1e4
    assert_same((out, lse), attention(**inputs, scale=1e5), tolerance=1e-9)


@every_forward
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_results_are_float64_whatever_comes_in(forward, dtype, make_inputs):
    inputs = {name: (3 * array).astype(dtype) for name, array in make_inputs().items()}
    wide = {name: array.astype("float64") for name, array in inputs.items()}
    for actual, expected in zip(forward(**inputs), forward(**wide), strict=True):
        assert actual.dtype == np.float64
        assert (actual == expected).all()


@every_forward
@pytest.mark.parametrize("L", [0, 1, 3])
def test_depth_as_a_list_is_depth_packed(forward, L, make_inputs, assert_same):
    packed = make_inputs(L=L)
    unpacked = packed | {name: slots(packed[name]) for name in ("k_depth", "v_depth")}
    assert_same(forward(**unpacked), forward(**packed), tolerance=0)


@every_backward
@pytest.mark.parametrize("L", [0, 1, 3])
def test_depth_gradients_come_in_the_form_given(backward, L, make_inputs, assert_same):
    packed = make_inputs(L=L)
    unpacked = packed | {name: slots(packed[name]) for name in ("k_depth", "v_depth")}
    dout = np.ones_like(attention(**packed)[0])
    expected, actual = backward(dout, **packed), backward(dout, **unpacked)
    for gradient, slot_gradients in zip(expected[3:], actual[3:], strict=True):
        assert isinstance(gradient, np.ndarray)
        assert isinstance(slot_gradients, list)
        assert_same(slot_gradients, slots(gradient), tolerance=0)


@every_backward
def test_without_depth_is_with_no_slots(backward, make_inputs, assert_same):
    packed = make_inputs(L=0)
    plain = {name: packed[name] for name in ("q", "k", "v")}
    assert_same(attention(**plain), attention(**packed), tolerance=0)

    dout = np.ones_like(attention(**plain)[0])
    gradients = backward(dout, **plain)
    assert gradients.dk_depth is None
    assert gradients.dv_depth is None
    assert_same(gradients[:3], backward(dout, **packed)[:3], tolerance=0)


def slots(packed: np.ndarray) -> list[np.ndarray]:
    return list(np.moveaxis(packed, 2, 0))
