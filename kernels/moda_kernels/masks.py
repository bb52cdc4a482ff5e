"""Who sees whom: the band mask, and the ranges of keys and tokens that it leaves.

A query at key position p sees the keys of the band [p - left, p + right]; a side that is None is unbounded,
and causal is right = 0. Of packed documents, ``bands`` has each token's first and last key and each key's
first and last token (see moda_kernels.bands), and stands in for left and right. Either way both ends of the
band never fall from a token to the next, so that a tile's keys are a range.
"""

import triton
import triton.language as tl


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
