"""Rows: which ones a tile has, and how they are loaded.

Rows of a tile are (token, group) pairs of one key/value head, r = t * G + g, so that all G queries that share
a key sit in one tile (arXiv 2603.15619, algorithm 1).
"""

import triton
import triton.language as tl


@triton.jit
def tile_rows(tile, head, T, H, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile's (token, group) rows: batch, key/value head, tokens, query heads, and which rows there are."""
    b = (head // H).to(tl.int64)
    j = (head % H).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_t = rows // G
    row_ok = offs_t < T
    return b, j, offs_t, j * G + rows % G, row_ok


@triton.jit
def tile_tokens(tile, T, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first and the last token of a tile."""
    return tile * BLOCK_M // G, tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // G, T - 1)


@triton.jit
def load_rows(ptrs, rows_ok, offs_d, D: tl.constexpr):
    """Load [.., BLOCK_D] rows of D elements; padding columns, and rows not ok, read as 0.

    ``rows_ok`` is None where all rows are.
    """
    rank: tl.constexpr = len(ptrs.shape)
    if rank == 2:
        columns_ok = (offs_d < D)[None, :]
    else:
        columns_ok = (offs_d < D)[None, None, :]
    if D == offs_d.shape[0] and rows_ok is None:
        return tl.load(ptrs)
    elif D == offs_d.shape[0]:
        return tl.load(ptrs, mask=tl.expand_dims(rows_ok, rank - 1), other=0.0)
    elif rows_ok is None:
        return tl.load(ptrs, mask=columns_ok, other=0.0)
    else:
        return tl.load(ptrs, mask=tl.expand_dims(rows_ok, rank - 1) & columns_ok, other=0.0)


@triton.jit
def load_queries(
    q_base, dout_base, lse_base, delta_base, q_strides, dout_strides, t, h, row_ok, T, offs_d, offs_dv,
    D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """q, dout, lse and delta of tokens t and heads h, counted from where the bases point; ``row_ok`` as in
    ``load_rows``. Rows that are not ok have p = exp(score - lse) = 0.
    """
    q_rows = q_base + t * q_strides[1] + h * q_strides[2]
    dout_rows = dout_base + t * dout_strides[1] + h * dout_strides[2]
    q = load_rows(q_rows[:, None] + offs_d[None, :], row_ok, offs_d, D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_rows[:, None] + offs_dv[None, :], row_ok, offs_dv, DV)
    if row_ok is None:
        lse = tl.load(lse_base + h * T + t)
        delta = tl.load(delta_base + h * T + t)
    else:
        lse = tl.load(lse_base + h * T + t, mask=row_ok, other=float("inf"))
        delta = tl.load(delta_base + h * T + t, mask=row_ok, other=0.0)
    return q, dout, lse, delta
