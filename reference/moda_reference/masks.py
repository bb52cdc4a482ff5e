"""The sequence mask: which keys a query may see. It never touches depth keys.

Queries are aligned with the end of the keys (bottom-right, as in FlashAttention): query t sits at
key position t + S - T, so that with a cache of S - T old keys the last query sees the last key.
"""

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import Window, integer, window_sides

Mask = npt.NDArray[np.bool_]


def visible(T: int, S: int, causal: bool = True, window: Window = None) -> Mask:
    """The (T, S) array that is True where query t sees sequence key n.

    `window` is a pair (left, right): from position i the keys i - left to i + right are visible,
    both included. A side that is None has no bound; an integer w stands for (w, w) and None for
    (None, None). `causal` sets right to 0. Where S < T the first T - S queries sit before all
    keys, and a causal one sees nothing.

    Raises TypeError or ValueError for a size or a window that is not an integer >= 0.

    >>> visible(3, 5).astype(int)
    array([[1, 1, 1, 0, 0],
           [1, 1, 1, 1, 0],
           [1, 1, 1, 1, 1]])
    >>> visible(4, 4, causal=False, window=(1, None)).astype(int)
    array([[1, 1, 1, 1],
           [1, 1, 1, 1],
           [0, 1, 1, 1],
           [0, 0, 1, 1]])
    """
    T, S = integer("T", T, 0), integer("S", S, 0)
    position = np.arange(T)[:, None] + S - T
    return in_reach(position, np.arange(S), reach(T, S, causal, window))


def chunk_visible(T: int, chunk_size: int) -> Mask:
    """The (T, T) array that is True where query t sees the depth slots of token s.

    Those are the tokens of its own chunk, tokens 0 to C - 1, C to 2 C - 1 and so on, up to itself.

    Raises TypeError or ValueError for a T that is not an integer >= 0 or a chunk size < 1.

    >>> chunk_visible(5, chunk_size=3).astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0],
           [0, 0, 0, 1, 0],
           [0, 0, 0, 1, 1]])
    """
    token, chunk_size = np.arange(integer("T", T, 0)), integer("chunk_size", chunk_size, 1)
    query = token[:, None]
    return (token <= query) & (token // chunk_size == query // chunk_size)


def reach(T: int, S: int, causal: bool, window: Window) -> tuple[int, int]:
    """How many keys to the left and to the right a query sees; T + S is past every key, and a side
    that is larger could wrap in 64 bits."""
    left, right = (T + S if side is None else min(side, T + S) for side in window_sides(window))
    return left, 0 if causal else right


def in_reach(
    position: npt.NDArray[np.intp], n: npt.NDArray[np.intp], reach: tuple[int, int]
) -> Mask:
    """Whether a query at `position` sees key `n`, for arrays that broadcast."""
    left, right = reach
    return (position - left <= n) & (n <= position + right)
