"""One maker of inputs and one comparison for the tests of the NumPy reference."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Arrays = dict[str, Any]


@pytest.fixture
def make_inputs() -> Callable[..., Arrays]:
    """Random q, k, v and packed depth, as keyword arguments of the attention functions."""

    def make(
        B: int = 2,
        T: int = 5,
        S: int | None = None,
        H: int = 2,
        G: int = 3,
        D: int = 4,
        DV: int = 3,
        L: int = 2,
    ) -> Arrays:
        rng = np.random.default_rng([B, T, H, G, D, DV, L])
        S = T if S is None else S
        return {
            "q": rng.normal(size=(B, T, H * G, D)),
            "k": rng.normal(size=(B, S, H, D)),
            "v": rng.normal(size=(B, S, H, DV)),
            "k_depth": rng.normal(size=(B, T, L, H, D)),
            "v_depth": rng.normal(size=(B, T, L, H, DV)),
        }

    return make


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Two results hold the same arrays up to float64 rounding; -inf equals -inf."""

    def check(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
        if isinstance(expected, tuple | list):
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                check(one, other, tolerance)
        else:
            np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)

    return check
