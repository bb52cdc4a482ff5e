"""Attention by tiles with an online softmax: the form that a GPU kernel mirrors.

A tile holds block_m rows of one KV head; row r = t * G + g is query g of token t, so that queries
which read the same keys sit together. Its state (m, l, acc) first passes over the sequence in
blocks of block_n keys, masked only where some row of the tile does not see some key of the block,
and then over the depth slots of each row's own token in blocks of block_l (arXiv 2603.15619,
section 3 and algorithm 1).

Exponentials have base 2, the base of the hardware's instruction: scores carry a factor log2(e), and
2^(score log2 e) = e^score.
"""

from collections.abc import Iterator
from itertools import product
from math import e, log, log2

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import Array, Depth, Window, integer, read_inputs
from moda_reference.masks import in_reach, reach
from moda_reference.softcap import softcapped

LOG2_E = log2(e)
LN_2 = log(2)

Indices = npt.NDArray[np.intp]


def attention_tiled(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    k_depth: Depth = None,
    v_depth: Depth = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    block_m: int = 16,
    block_n: int = 16,
    block_l: int = 8,
) -> tuple[Array, Array]:
    """`attention`, with its arguments and results, in blocks of rows, sequence keys and slots.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(3, 1, 50, 2, 4))
    >>> out, lse = attention_tiled(q, k, v, [k], [v], block_m=7, block_n=5)
    >>> out_whole, lse_whole = attention_tiled(q, k, v, [k], [v], block_m=50, block_n=50)
    >>> bool(np.allclose(out, out_whole)), bool(np.allclose(lse, lse_whole))
    (True, True)
    """
    x = read_inputs(q, k, v, k_depth, v_depth, causal, scale, window, softcap)
    block_m, block_n, block_l = (
        integer(name, size, at_least=1)
        for name, size in (("block_m", block_m), ("block_n", block_n), ("block_l", block_l))
    )
    (B, T, HQ, _), (_, S, H, DV), L = x.q.shape, x.v.shape, x.k_depth.shape[2]
    G = HQ // H
    sides = reach(T, S, x.causal, x.window)

    out, lse = np.empty((B, T, HQ, DV)), np.empty((B, HQ, T))
    for b, j, rows in product(range(B), range(H), blocks(0, T * G, block_m)):
        token, head = rows // G, j * G + rows % G
        position = token + S - T
        q_i = x.q[b, token, head]  # [M, D]
        m_i = np.full(len(rows), -np.inf)
        l_i = np.zeros(len(rows))
        acc = np.zeros((len(rows), DV))

        for n, masked in sequence_blocks(position, S, sides, block_n):
            scores = base2_scores(q_i @ x.k[b, n, j].T, x.scale, x.softcap)  # [M, N]
            if masked:
                scores = np.where(in_reach(position[:, None], n, sides), scores, -np.inf)
            m_i, l_i, acc, p = online_softmax_update(m_i, l_i, acc, scores)
            acc += p @ x.v[b, n, j]

        for slots in blocks(0, L, block_l):
            k_own = x.k_depth[b, token[:, None], slots, j]  # [M, BLOCK_L, D]
            v_own = x.v_depth[b, token[:, None], slots, j]  # [M, BLOCK_L, DV]
            scores = base2_scores(np.einsum("md,mld->ml", q_i, k_own), x.scale, x.softcap)
            m_i, l_i, acc, p = online_softmax_update(m_i, l_i, acc, scores)
            acc += np.einsum("ml,mld->md", p, v_own)

        out[b, token, head], lse[b, head, token] = finish(m_i, l_i, acc)
    return out, lse


def blocks(begin: int, end: int, size: int) -> Iterator[Indices]:
    """The integers from `begin` to before `end` in runs of `size`, the last one shorter.

    >>> [run.tolist() for run in blocks(2, 7, size=3)]
    [[2, 3, 4], [5, 6]]
    """
    for start in range(begin, end, size):
        yield np.arange(start, min(start + size, end))


def sequence_blocks(
    position: Indices, S: int, reach: tuple[int, int], block_n: int
) -> Iterator[tuple[Indices, bool]]:
    """The blocks of keys that some row of a tile sees, each with whether it needs the mask.

    `position` holds the rows' positions in ascending order. A block needs no mask if the last row
    still sees its first key and the first row already sees its last key.

    >>> tile = np.array([4, 5])
    >>> [(n.tolist(), masked) for n, masked in sequence_blocks(tile, 8, (3, 0), block_n=2)]
    [([1, 2], True), ([3, 4], False), ([5], True)]
    """
    left, right = reach
    first, last = int(position[0]), int(position[-1])
    for n in blocks(max(0, first - left), min(S, last + right + 1), block_n):
        yield n, not (last - left <= n[0] and n[-1] <= first + right)


def base2_scores(products: Array, scale: float, softcap: float | None) -> Array:
    """log2(e) times the scores; without a softcap that is one multiplication per score."""
    if softcap is None:
        return products * (scale * LOG2_E)
    return softcapped(products * scale, softcap) * LOG2_E


def online_softmax_update(
    m_i: Array, l_i: Array, acc: Array, scores: Array
) -> tuple[Array, Array, Array, Array]:
    """Take a block of scores [M, N] into the state; return the state and the block's weights p.

    After it, for all scores s so far: m = max s, l = sum 2^(s - m), and acc, to which the caller
    adds p @ v, is sum 2^(s - m) v of the blocks before. A row that has seen nothing yet has
    m = -inf; subtracting 0 in its place keeps its weights at 0 where -inf - -inf would give NaN.
    """
    m_new = np.maximum(m_i, scores.max(axis=1))
    shift = np.where(np.isneginf(m_new), 0.0, m_new)
    alpha = np.exp2(m_i - shift)  # [M], rescales what was summed under the old maximum
    p = np.exp2(scores - shift[:, None])  # [M, N]
    return m_new, l_i * alpha + p.sum(axis=1), acc * alpha[:, None], p


def finish(m_i: Array, l_i: Array, acc: Array) -> tuple[Array, Array]:
    """out [M, DV] and the natural lse [M] from the state; 0 and -inf for rows that saw nothing."""
    l_safe = np.where(l_i == 0, 1.0, l_i)
    return acc / l_safe[:, None], LN_2 * (m_i + np.log2(l_safe))
