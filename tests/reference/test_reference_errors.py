"""Each wrong argument is named in the error, with what was given and what is allowed."""

import re

import numpy as np
import pytest

from moda_reference import (
    attention,
    attention_backward,
    attention_backward_loops,
    attention_loops,
    attention_tiled,
)

RIGHT = {
    "q": np.zeros((2, 5, 6, 4)),
    "k": np.zeros((2, 5, 2, 4)),
    "v": np.zeros((2, 5, 2, 3)),
    "k_depth": np.zeros((2, 5, 7, 2, 4)),
    "v_depth": np.zeros((2, 5, 7, 2, 3)),
}
SHAPES = [  # argument, its wrong shape, and the error
    ("q", (5, 6, 4), "q has shape (5, 6, 4), it must be (B, T, HQ, D)"),
    ("k", (1, 5, 2, 4), "k has shape (1, 5, 2, 4), it must be (B=2, S, H, D=4)"),
    ("v", (2, 4, 2, 3), "v has shape (2, 4, 2, 3), it must be (B=2, S=5, H=2, DV)"),
    ("q", (2, 5, 5, 4), "q has HQ=5 heads and k has H=2; HQ must be a multiple of H"),
    ("q", (2, 5, 6, 0), "q has shape (2, 5, 6, 0), D must be at least 1"),
    ("k", (2, 5, 0, 4), "k has shape (2, 5, 0, 4), H must be at least 1"),
    (
        "k_depth",
        (2, 5, 2, 7, 4),
        "k_depth has shape (2, 5, 2, 7, 4), it must be (B=2, T=5, L, H=2, D=4)",
    ),
    (
        "v_depth",
        (2, 5, 7, 2, 4),
        "v_depth has shape (2, 5, 7, 2, 4), it must be (B=2, T=5, L, H=2, DV=3)",
    ),
    (
        "v_depth",
        (2, 5, 3, 2, 3),
        "k_depth has 7 slots and v_depth has 3; they must have equally many",
    ),
]
SLOTS = [np.zeros((2, 5, 2, 4)), np.zeros((2, 4, 2, 4))]
WINDOW = "window must be None, an integer >= 0, or a pair (left, right) of these, got "
VALUES = [  # argument, its wrong value, and the error
    ("k_depth", None, "k_depth is None, but v_depth is given; give both or neither"),
    ("v_depth", None, "v_depth is None, but k_depth is given; give both or neither"),
    ("v_depth", [], "k_depth has 7 slots and v_depth has 0; they must have equally many"),
    (
        "k_depth",
        SLOTS,
        "k_depth[1] has shape (2, 4, 2, 4), it must be (B=2, T=5, H=2, D=4)",
    ),
    ("scale", float("nan"), "scale must be None or a finite number, got nan"),
    ("softcap", 0, "softcap must be None or a finite number > 0, got 0"),
    ("softcap", float("inf"), "softcap must be None or a finite number > 0, got inf"),
    ("window", -1, WINDOW + "-1"),
    ("window", (1, -2), WINDOW + "(1, -2)"),
    ("window", (1, 2, 3), WINDOW + "(1, 2, 3)"),
]
TYPES = [  # argument, its value of a wrong type, and the error
    ("q", None, "q must be an array of real numbers, got dtype object"),
    ("k", RIGHT["k"] * 1j, "k must be an array of real numbers, got dtype complex128"),
    ("causal", "no", "causal must be True or False, got 'no'"),
    ("scale", "big", "scale must be None or a finite number, got 'big'"),
    ("softcap", True, "softcap must be None or a finite number > 0, got True"),
    ("window", 1.0, WINDOW + "1.0"),
    ("window", (None, True), WINDOW + "(None, True)"),
]
CASES = [
    *((name, np.zeros(shape), ValueError, text) for name, shape, text in SHAPES),
    *((name, value, ValueError, text) for name, value, text in VALUES),
    *((name, value, TypeError, text) for name, value, text in TYPES),
]
DOUT = np.zeros((2, 5, 6, 3))


@pytest.mark.parametrize(("name", "value", "error", "text"), CASES, ids=[c[3] for c in CASES])
def test_forward_and_backward(name, value, error, text):
    wrong = RIGHT | {name: value}
    for form in (attention, attention_loops, attention_tiled):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            form(**wrong)
    for form in (attention_backward, attention_backward_loops):
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            form(DOUT, **wrong)


@pytest.mark.parametrize("form", [attention_backward, attention_backward_loops])
def test_upstream_gradients(form):
    text = "dout has shape (2, 5, 6, 4), it must be (B=2, T=5, HQ=6, DV=3)"
    with pytest.raises(ValueError, match=re.escape(text)):
        form(RIGHT["q"], **RIGHT)
    text = "dlse has shape (2, 5, 6), it must be (B=2, HQ=6, T=5)"
    with pytest.raises(ValueError, match=re.escape(text)):
        form(DOUT, **RIGHT, dlse=DOUT[..., 0])


@pytest.mark.parametrize("name", ["block_m", "block_n", "block_l"])
def test_block_sizes(name):
    with pytest.raises(ValueError, match=f"^{name} must be an integer >= 1, got 0$"):
        attention_tiled(**RIGHT, **{name: 0})
    with pytest.raises(TypeError, match=rf"^{name} must be an integer >= 1, got 2\.5$"):
        attention_tiled(**RIGHT, **{name: 2.5})


def test_nothing_is_wrong_with_the_right_arguments():
    for form in (attention, attention_loops, attention_tiled):
        assert form(**RIGHT)[0].shape == DOUT.shape
