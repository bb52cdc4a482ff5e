"""Forward: one online softmax over the sequence's keys and the depth slots of each row's token.

    lse = log( sum_n exp a_n + sum_l exp d_l ),   out = sum_n e^(a_n - lse) v_n + sum_l e^(d_l - lse) v_l

(arXiv 2603.15619, section 3, algorithm 1.) A program owns BLOCK_M (token, group) rows of one key/value
head. The state (m_i, l_i, acc) of the online softmax stays in registers from the first loop to the
last; which key set comes first makes no difference to it.
"""

import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.bands import Bands
from moda_kernels.forward_chunk import attend_chunk
from moda_kernels.forward_depth import attend_depth
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout, lse_dtype
from moda_kernels.masks import band_mask, key_range, keys_seen, masked_blocks
from moda_kernels.rows import load_rows, tile_rows, tile_tokens
from moda_kernels.slots import DepthLayout, depth_pointers
from moda_kernels.softmax import base2_scores, natural_lse, online_softmax


@triton.jit
def _attend_sequence(
    q, m_i, l_i, acc, k_base, v_base, stride_k, stride_v, turn, end_turn, blocks, begin, end, first_token, last_token,
    bands, offs_t, T, S, scale, left, right, softcap, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The online softmax over blocks of the keys begin..end, from ``turn`` on and past the last one to the first:
    EDGE blocks may hold keys that some rows do not see.
    """
    offs_d = tl.arange(0, q.shape[1])
    offs_dv = tl.arange(0, acc.shape[1])
    block = tl.arange(0, BLOCK_N)
    k_block = k_base + block.to(tl.int64) * stride_k
    v_block = v_base + block.to(tl.int64) * stride_v
    for i in range(turn, end_turn):
        start = begin + (tl.where(i < blocks, i, i - blocks) if EDGE else i) * BLOCK_N
        offs_n = start + block
        key_ok = keys_seen(bands, offs_n, first_token, last_token, T, S, left, end) if EDGE else None
        k_rows = k_block + tl.cast(start, tl.int64) * stride_k
        v_rows = v_block + tl.cast(start, tl.int64) * stride_v
        k = load_rows(k_rows[:, None] + offs_d[None, :], key_ok, offs_d, D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_rows[:, None] + offs_dv[None, :], key_ok, offs_dv, DV)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scores, excess = base2_scores(qk, scale, softcap, q.dtype)
        if EDGE:
            seen = band_mask(bands, offs_t[:, None], offs_n[None, :], T, S, left, right)
            scores = tl.where(seen, scores, float("-inf"))
        m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, excess)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["T", "S", "L", "left", "right", "chunk", "mixed"])
def _moda_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_depth, v_depth, out_ptr, lse_ptr, bands,
    q_strides, k_strides, v_strides, scale, left, right, softcap, chunk, mixed, B, T, S, L, H,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DEPTH_DOT: tl.constexpr, DEPTH_STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    turn = tl.program_id(0) // (B * H)
    tile = tl.cdiv(T * G, BLOCK_M) - 1 - turn  # longest causal rows first
    if mixed:  # or longest and shortest by turns
        tile = tl.where(turn % 2 == 0, tile + turn // 2, turn // 2)
    head = tl.program_id(0) % (B * H)
    b, j, offs_t, query_head, row_ok = tile_rows(tile, head, T, H, G, BLOCK_M)
    first_token, last_token = tile_tokens(tile, T, G, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)

    q_rows = q_ptr + b * q_strides[0] + offs_t.to(tl.int64) * q_strides[1] + query_head * q_strides[2]
    q = load_rows(q_rows[:, None] + offs_d[None, :], row_ok, offs_d, D)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    if k_depth is not None:
        if chunk is not None:
            m_i, l_i, acc = attend_chunk(
                q, m_i, l_i, acc, k_depth, v_depth, b, j, offs_t, first_token, last_token, L, chunk, scale, softcap,
                D, DV, BLOCK_N, ALIGNED,
            )  # fmt: skip
        elif DEPTH_DOT:  # first: its loads overlap other programs' sequence products
            m_i, l_i, acc = attend_depth(
                q, m_i, l_i, acc, k_depth, v_depth, b, j, tile, T, L, scale, softcap,
                G, D, DV, BLOCK_L, True, DEPTH_STAGES, ALIGNED,
            )  # fmt: skip

    k_base = k_ptr + b * k_strides[0] + j * k_strides[2]
    v_base = v_ptr + b * v_strides[0] + j * v_strides[2]
    begin, inner_begin, inner_end, end = key_range(bands, first_token, last_token, T, S, left, right, BLOCK_N)
    blocks, first, last = masked_blocks(begin, inner_begin, inner_end, end, BLOCK_N)
    m_i, l_i, acc = _attend_sequence(
        q, m_i, l_i, acc, k_base, v_base, k_strides[1], v_strides[1], last, blocks + first, blocks, begin, end,
        first_token, last_token, bands, offs_t, T, S, scale, left, right, softcap, D, DV, BLOCK_N, True,
    )  # fmt: skip
    m_i, l_i, acc = _attend_sequence(
        q, m_i, l_i, acc, k_base, v_base, k_strides[1], v_strides[1], first, last, blocks, begin, end,
        first_token, last_token, bands, offs_t, T, S, scale, left, right, softcap, D, DV, BLOCK_N, False,
    )  # fmt: skip

    if k_depth is not None:
        if chunk is None and not DEPTH_DOT:  # last: before the sequence loop its layouts spill
            m_i, l_i, acc = attend_depth(
                q, m_i, l_i, acc, k_depth, v_depth, b, j, tile, T, L, scale, softcap,
                G, D, DV, BLOCK_L, False, DEPTH_STAGES, ALIGNED,
            )  # fmt: skip

    l_safe = tl.where(l_i == 0.0, 1.0, l_i)  # a row that saw nothing: out = 0, lse = -inf
    out_rows = out_ptr + ((b * T + offs_t) * (H * G) + query_head) * DV
    tl.store(
        out_rows[:, None] + offs_dv[None, :],
        (acc / l_safe[:, None]).to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (offs_dv < DV)[None, :],
    )
    tl.store(lse_ptr + (b * H * G + query_head) * T + offs_t, natural_lse(m_i, l_safe, q.dtype), mask=row_ok)


@cached_launch
def _prepare(p: Problem, q: Layout, k: Layout, v: Layout, depth: DepthLayout) -> Launch:
    tile = tuning.forward_tile(q.device, q.dtype, p.G, p.D, p.DV, depth.packed)
    depth_tile = tuning.forward_depth(q.device, q.dtype, p.G, p.D, p.DV, tile.BLOCK_M, depth.packed)
    programs = triton.cdiv(p.T * p.G, tile.BLOCK_M) * p.B * p.H
    mixed = p.L > 0 and p.chunk is None and tuning.forward_mixed(q.device, programs, p.D, p.DV, depth.packed)
    return Launch(
        _moda_forward_kernel, programs,
        q.strides[:3], k.strides[:3], v.strides[:3], p.scale, p.left, p.right, p.softcap, p.chunk, int(mixed),
        p.B, p.T, p.S, p.L, p.H,
        G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV),
        ALIGNED=depth.aligned, **tile._asdict(), **depth_tile._asdict(),
    )  # fmt: skip


def launch_forward(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], bands: Bands = None
) -> tuple[Tensor, Tensor]:
    """out (B, T, HQ, DV) in q's dtype and lse (B, HQ, T) in ``lse_dtype``, both contiguous."""
    out = q.new_empty(p.B, p.T, p.H * p.G, p.DV)
    lse = q.new_empty(p.B, p.H * p.G, p.T, dtype=lse_dtype(q.dtype))
    depth, depth_layout = depth_pointers(k_depth, v_depth) if p.L else ([None, None], DepthLayout())
    _prepare(p, layout(q), layout(k), layout(v), depth_layout)(q, k, v, *depth, out, lse, bands)
    return out, lse
