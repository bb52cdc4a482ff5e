"""The closed-form gradient against central differences of a random scalar of out and lse."""

import numpy as np
import pytest

from moda_reference import attention, attention_backward

STEP = 1e-5  # truncation STEP^2 = 1e-10, rounding 1e-16 / STEP = 1e-11
SIZES = {"B": 1, "T": 3, "H": 2, "G": 3, "D": 3, "DV": 2, "L": 2}
CASES = {  # what differs from SIZES, and the options
    "causal": {},
    "full": {"causal": False},
    "longer keys": {"S": 6},
    "window": {"T": 5, "window": 1},
    "window pair": {"T": 5, "causal": False, "window": (2, 0)},
    "softcap": {"softcap": 0.8},
    "softcap, window": {"S": 5, "softcap": 1.5, "causal": False, "window": (1, 1)},
    "scale": {"scale": -0.3},
    "no depth": {"L": 0},
    "depth alone": {"S": 0},
    "rows that see depth alone": {"S": 1},
    "rows that see nothing": {"T": 4, "S": 2, "L": 0, "softcap": 2.0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("lse_only", [False, True], ids=["out and lse", "lse only"])
def test_gradient(case, lse_only, make_inputs):
    sizes = {name: case[name] for name in case if name.isupper()}
    options = {name: case[name] for name in case if name.islower()}
    inputs = make_inputs(**SIZES | sizes)
    out, lse = attention(**inputs, **options)
    rng = np.random.default_rng(2)
    dout = np.zeros_like(out) if lse_only else rng.normal(size=out.shape)
    dlse = rng.normal(size=lse.shape)

    def scalar() -> float:
        out, lse = attention(**inputs, **options)
        return float((dout * out).sum() + (dlse * np.where(lse == -np.inf, 0, lse)).sum())

    gradients = attention_backward(dout, **inputs, dlse=dlse, **options)
    for (name, array), gradient in zip(inputs.items(), gradients, strict=True):
        expected = central_differences(scalar, array)
        np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-8, err_msg=name)


def test_a_missing_dlse_is_zero(make_inputs, assert_same):
    inputs = make_inputs()
    out, lse = attention(**inputs)
    expected = attention_backward(out, **inputs, dlse=np.zeros_like(lse))
    assert_same(attention_backward(out, **inputs), expected, tolerance=0)


def central_differences(scalar, array: np.ndarray) -> np.ndarray:
    """Gradient of `scalar()` in `array`, one element at a time, in place."""
    gradient = np.empty_like(array)
    for index in np.ndindex(*array.shape):
        value = array[index]
        array[index] = value + STEP
        above = scalar()
        array[index] = value - STEP
        gradient[index] = (above - scalar()) / (2 * STEP)
        array[index] = value
    return gradient
