"""Forward over the depth of a chunk: a token sees the slots of its chunk's tokens up to itself.

Row e = s * L + l is slot l of token s. The rows that a tile of queries sees begin with those of the
first token's chunk and end with those of the last token: a run of keys like the sequence's, under a
mask of its own.
"""

import triton
import triton.language as tl

from moda_kernels.masks import chunk_mask
from moda_kernels.rows import load_rows
from moda_kernels.slots import slot_rows
from moda_kernels.softmax import base2_scores, online_softmax


@triton.jit
def attend_chunk(
    q, m_i, l_i, acc, k_depth, v_depth, b, j, tokens, first_token, last_token, L, chunk, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the depth that the rows of a tile see; ``tokens`` [BLOCK_M] are theirs."""
    offs_d = tl.arange(0, q.shape[1])
    offs_dv = tl.arange(0, acc.shape[1])
    end = (last_token + 1) * L
    for start in range((first_token - first_token % chunk) * L, end, BLOCK_N):
        offs_e = start + tl.arange(0, BLOCK_N)
        ok = offs_e < end
        owners = offs_e // L
        k_rows = slot_rows(k_depth, b, j, owners, offs_e % L, ok, ALIGNED)
        v_rows = slot_rows(v_depth, b, j, owners, offs_e % L, ok, ALIGNED)
        k = load_rows(k_rows[:, None] + offs_d[None, :], ok, offs_d, D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_rows[:, None] + offs_dv[None, :], ok, offs_dv, DV)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        seen = chunk_mask(tokens[:, None], owners[None, :], chunk)
        scores, excess = base2_scores(qk, scale, softcap, q.dtype)
        scores = tl.where(seen, scores, float("-inf"))
        m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, excess)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_i, l_i, acc
