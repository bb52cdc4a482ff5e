"""What the passes share: scores, the band mask, the online softmax, where slots and caches lie.

Rows of a tile are (token, group) pairs of one key/value head, r = t * G + g, so that all G queries
that share a key sit in one tile (arXiv 2603.15619, algorithm 1). A query at key position p sees the
keys of the band [p - left, p + right]; a side that is None is unbounded, and causal is right = 0. Of
packed documents, ``bands`` has each token's first and last key and each key's first and last token
(see moda_kernels.bands), and stands in for left and right. Either way both ends of the band never fall
from a token to the next, so that a tile's keys are a range.
Scores are kept in base 2: exp(x) = 2^(x log2 e).
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) cancels."""
    x2 = x * x
    series = 0.0207946177 - 0.0058939453 * x2  # least squares on x^2 in [0, 0.36], 1.3 ulp
    series = x2 * (-0.333332975 + x2 * (0.133319153 + x2 * (-0.053783293 + x2 * series)))
    magnitude = tl.abs(x)
    large = 1 - 2 / (tl.exp2(magnitude * (2 * LOG2E)) + 1)
    return tl.where(magnitude < 0.55, x + x * series, tl.where(x < 0, -large, large))


@triton.jit
def base2_scores(qk, scale, softcap, dtype: tl.constexpr):
    """log2(e) times the score of each raw product q . k, and what rounding added to it: float32 inputs would
    notice that of a large score, 16-bit ones do not.
    """
    if softcap is not None:
        return tanh(qk * (scale / softcap)) * (softcap * LOG2E), 0.0
    elif dtype == tl.float32:
        scores = tl.fma(qk, scale * LOG2E, 0.0)  # not a product, which compilers would fuse into later sums
        excess = -tl.fma(qk, scale * LOG2E, -scores)
        return scores, tl.where(tl.abs(scores) < float("inf"), excess, 0.0)
    else:
        return qk * (scale * LOG2E), 0.0


@triton.jit
def softcap_slope(scores, softcap):
    """d score / d (scale q . k) = 1 - tanh^2, from the base-2 scores."""
    capped = scores / (softcap * LOG2E)
    return 1 - capped * capped


@triton.jit
def band_mask(bands, offs_t, keys, T, S, left, right):
    """Which keys each token sees; the two index tensors broadcast against each other."""
    if bands is not None:
        first_key = tl.load(bands[0] + offs_t, mask=offs_t < T, other=S)
        last_key = tl.load(bands[1] + offs_t, mask=offs_t < T, other=-1)
        seen = (keys >= first_key) & (keys <= last_key)
    else:
        seen = keys < S
        if left is not None:
            seen = seen & (keys >= offs_t + (S - T) - left)
        if right is not None:
            seen = seen & (keys <= offs_t + (S - T) + right)
    return seen


@triton.jit
def chunk_mask(tokens, owners, chunk):
    """Whether a token sees the depth of another: one of its chunk up to itself."""
    return (owners <= tokens) & (owners >= tokens - tokens % chunk)


@triton.jit
def key_range(bands, first, last, T, S, left, right, BLOCK_N: tl.constexpr):
    """Keys that tokens first..last see: [begin, end) by any, [inner_begin, inner_end) by all.

    A block inside the inner range needs no mask; ``begin`` is a multiple of BLOCK_N.
    """
    begin = 0
    inner_begin = 0
    end = S
    inner_end = S
    if bands is not None:
        begin = tl.load(bands[0] + first) // BLOCK_N * BLOCK_N
        inner_begin = tl.load(bands[0] + last)
        end = tl.load(bands[1] + last) + 1
        inner_end = tl.load(bands[1] + first) + 1
    else:
        if left is not None:
            begin = tl.maximum(first + (S - T) - left, 0) // BLOCK_N * BLOCK_N
            inner_begin = last + (S - T) - left
        if right is not None:
            end = tl.minimum(last + (S - T) + right + 1, S)
            inner_end = tl.minimum(first + (S - T) + right + 1, S)
    return begin, inner_begin, inner_end, end


@triton.jit
def token_range(bands, first, last, T, S, left, right):
    """Tokens that see keys first..last: [begin, end) any of them, [inner_begin, inner_end) all."""
    begin = 0
    inner_begin = 0
    end = T
    inner_end = T
    if bands is not None:
        begin = tl.load(bands[2] + first)
        inner_begin = tl.load(bands[2] + last)
        end = tl.load(bands[3] + last) + 1
        inner_end = tl.load(bands[3] + first) + 1
    else:
        if right is not None:
            begin = tl.maximum(first - (S - T) - right, 0)
            inner_begin = last - (S - T) - right
        if left is not None:
            end = tl.minimum(last - (S - T) + left + 1, T)
            inner_end = tl.minimum(first - (S - T) + left + 1, T)
    return begin, inner_begin, inner_end, end


@triton.jit
def masked_blocks(begin, inner_begin, inner_end, end, BLOCK: tl.constexpr):
    """Which blocks of begin..end need a mask, where [inner_begin, inner_end) needs none: (blocks, first, last) for
    blocks 0..first and last..blocks. One at the end does in any case: see "Two loops" in docs/design.md.
    """
    blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK)
    last = tl.maximum(tl.minimum(inner_end, end - 1) - begin, 0) // BLOCK
    first = tl.minimum(tl.cdiv(tl.maximum(inner_begin - begin, 0), BLOCK), last)
    return blocks, first, last


@triton.jit
def keys_seen(bands, keys, first, last, T, S, left, end):
    """Which keys at least one of the tokens first..last sees; no key from ``end`` on.

    The others may hold anything, and 0 times NaN is NaN: they must not be loaded.
    """
    if bands is not None:
        first_token = tl.load(bands[2] + keys, mask=keys < S, other=T)
        last_token = tl.load(bands[3] + keys, mask=keys < S, other=-1)
        return tl.maximum(first_token, first) <= tl.minimum(last_token, last)
    elif left is not None:
        return (keys >= first + (S - T) - left) & (keys < end)
    else:
        return keys < end


@triton.jit
def tokens_seeing(bands, tokens, first, last, T, S):
    """Of packed documents, which tokens see at least one of the keys first..last."""
    first_key = tl.load(bands[0] + tokens, mask=tokens < T, other=S)
    last_key = tl.load(bands[1] + tokens, mask=tokens < T, other=-1)
    return tl.maximum(first_key, first) <= tl.minimum(last_key, last)


@triton.jit
def online_softmax(m_i, l_i, scores, excess):
    """Take in scores along the last axis: new (m_i, l_i), the factor for what came before, and p.

    ``excess`` is what rounding added to the scores, see ``base2_scores``.
    """
    axis: tl.constexpr = len(scores.shape) - 1
    m_new = tl.maximum(m_i, tl.max(scores, axis))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    alpha = tl.exp2(m_i - shift)
    p = tl.exp2(scores - tl.expand_dims(shift, axis) - excess)
    return m_new, l_i * alpha + tl.sum(p, axis), alpha, p


@triton.jit
def base2_lse(lse, dtype: tl.constexpr):
    """log2(e) times a natural-log lse, and what rounding took from it: that of float32 inputs is float64."""
    if dtype == tl.float32:
        finite = tl.abs(lse) < float("inf")
        exact = tl.where(finite, lse, 0.0).to(tl.float64) * LOG2E
        high = exact.to(tl.float32)
        return tl.where(finite, high, lse.to(tl.float32)), (exact - high).to(tl.float32)
    else:
        return lse * LOG2E, tl.zeros_like(lse)


@triton.jit
def base2_log_p(scores, excess, lse, dtype: tl.constexpr):
    """log2 of the probabilities of ``base2_scores``; ``lse``, natural, broadcasts against them."""
    high, low = base2_lse(lse, dtype)
    return scores - high - (low + excess)


@triton.jit
def natural_lse(m_i, l_i, dtype: tl.constexpr):
    """The natural-log lse of an online softmax's base-2 state, in float64 for float32 inputs."""
    if dtype == tl.float32:
        return (m_i.to(tl.float64) + tl.log2(l_i).to(tl.float64)) * LN2
    else:
        return (m_i + tl.log2(l_i)) * LN2


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


@triton.jit
def score_gradient(p, dp, delta, scores, softcap):
    """ds = p (dp - delta), by the score before the softcap; ``delta`` broadcasts against p."""
    ds = p * (dp - delta)
    if softcap is not None:
        ds *= softcap_slope(scores, softcap)
    return ds


@triton.jit
def slot_rows(depth, b, j, offs_t, offs_l, l_ok, ALIGNED: tl.constexpr):
    """Pointers [.., BLOCK_L] to rows (b, t, j) of depth slots ``offs_l``; ``offs_t`` is [.., 1], or
    [BLOCK_L] for one token to each slot.

    ``depth`` is (words, (strides, dtype)), see moda_kernels.slots, or, for a packed tensor, (pointer,
    (stride_b, stride_t, stride_l, stride_h)): both know the slots' dtype, which need not be q's. ALIGNED:
    every row of every slot starts on 16 bytes, which lets loads be vectorized although addresses come from
    memory.
    """
    t = offs_t.to(tl.int64)
    PAIRS: tl.constexpr = len(offs_t.shape) == 1
    if len(depth[1]) == 2:
        word = tl.load(depth[0] + offs_l, mask=l_ok, other=0)
        strides = depth[1][0] + (word >> 50) * 3
        start = b * tl.load(strides) + j * tl.load(strides + 2)
        rows = (word & ((1 << 50) - 1)).to(tl.pointer_type(depth[1][1])) + start
        if PAIRS:
            rows = rows + t * tl.load(strides + 1)
            return tl.multiple_of(rows, [16]) if ALIGNED else rows
        else:
            rows = rows[None, :] + t * tl.load(strides + 1)[None, :]
            return tl.multiple_of(rows, [16, 16]) if ALIGNED else rows
    else:
        stride_b, stride_t, stride_l, stride_h = depth[1]
        rows = depth[0] + b * stride_b + j * stride_h
        if PAIRS:
            return rows + t * stride_t + offs_l.to(tl.int64) * stride_l
        else:
            return rows + t * stride_t + offs_l.to(tl.int64)[None, :] * stride_l


@triton.jit
def skip_slots(depth, first):
    """depth[0], as ``slot_rows`` takes it, past the first slots."""
    if len(depth[1]) == 2:
        return depth[0] + first
    else:
        return depth[0] + first.to(tl.int64) * depth[1][2]


@triton.jit
def cache_places(table_ptr, table_stride, b, positions, ok, pages, PAGE_SIZE: tl.constexpr):
    """Where positions of sequence b lie on the first two axes of a cache, and which of those ok do.

    ``table_ptr`` is None for a cache with one row of positions per sequence. Else it leads to the pages
    of each sequence; entries of positions that are not ok are not read, and a page that does not exist
    holds nothing.
    """
    if table_ptr is None:
        return b, tl.cast(positions, tl.int64), ok
    else:
        page = tl.load(table_ptr + b * table_stride + positions // PAGE_SIZE, mask=ok, other=-1)
        there = (page >= 0) & (page < pages)
        return page.to(tl.int64), tl.cast(positions % PAGE_SIZE, tl.int64), there
