"""The sequence mask, as pictures and from its definition, and the blocks that tiles make of it."""

from itertools import product

import numpy as np
import pytest

from moda_reference import visible
from moda_reference.masks import reach
from moda_reference.tiled import sequence_blocks

PICTURES = [
    ({"T": 3, "S": 3}, ["#..", "##.", "###"]),
    ({"T": 2, "S": 4}, ["###.", "####"]),
    ({"T": 4, "S": 2}, ["..", "..", "#.", "##"]),
    ({"T": 1, "S": 4}, ["####"]),
    ({"T": 3, "S": 3, "causal": False}, ["###", "###", "###"]),
    ({"T": 4, "S": 2, "causal": False}, ["##", "##", "##", "##"]),
    ({"T": 4, "S": 4, "window": 1}, ["#...", "##..", ".##.", "..##"]),
    ({"T": 4, "S": 4, "window": 1, "causal": False}, ["##..", "###.", ".###", "..##"]),
    ({"T": 4, "S": 4, "window": 0, "causal": False}, ["#...", ".#..", "..#.", "...#"]),
    ({"T": 4, "S": 4, "window": (0, 2), "causal": False}, ["###.", ".###", "..##", "...#"]),
    ({"T": 4, "S": 4, "window": (0, 2)}, ["#...", ".#..", "..#.", "...#"]),
    ({"T": 3, "S": 4, "window": (None, 0), "causal": False}, ["##..", "###.", "####"]),
    ({"T": 3, "S": 4, "window": (1, None), "causal": False}, ["####", ".###", "..##"]),
    ({"T": 2, "S": 5, "window": (1, 0)}, ["..##.", "...##"]),
    ({"T": 4, "S": 1, "window": (0, 1), "causal": False}, [".", ".", "#", "#"]),
]
WINDOWS = [None, 0, 3, (0, 2), (2, None), (None, 1), (1, 4)]


@pytest.mark.parametrize(("arguments", "picture"), PICTURES, ids=str)
def test_pictures(arguments, picture):
    assert [
        "".join(".#"[cell] for cell in row) for row in visible(**arguments).astype(int)
    ] == picture


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_definition(causal, window):
    left, right = window if isinstance(window, tuple) else (window, window)
    for T, S in product(range(7), range(9)):
        mask = visible(T, S, causal, window)
        assert mask.shape == (T, S)
        assert mask.dtype == bool
        for t, n in product(range(T), range(S)):
            ahead = n - (t + S - T)
            sees = (
                (left is None or ahead >= -left)
                and (right is None or ahead <= right)
                and not (causal and ahead > 0)
            )
            assert mask[t, n] == sees


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_n", [1, 3, 4])
def test_blocks_cover_what_is_visible_and_mask_only_where_needed(causal, window, block_n):
    for T, S in product([1, 5, 8], [0, 1, 5, 8, 11]):
        mask = visible(T, S, causal, window)
        for first, last in product(range(T), range(T)):
            if first > last:
                continue
            tile = mask[first : last + 1]
            covered = np.zeros(S, dtype=int)
            position = np.arange(first, last + 1) + S - T
            for n, masked in sequence_blocks(position, S, reach(T, S, causal, window), block_n):
                covered[n] += 1
                assert masked == (not tile[:, n].all())
            assert (covered == tile.any(axis=0)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"T": -1, "S": 3}, ValueError, r"T must be an integer >= 0, got -1"),
        ({"T": 3, "S": 2.0}, TypeError, r"S must be an integer >= 0, got 2\.0"),
        (
            {"T": 3, "S": 3, "window": -1},
            ValueError,
            r"window must be None, an integer >= 0, .* got -1",
        ),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        visible(**arguments)
