"""Backward for q: the sequence's share of dq, on top of the share that the depth pass left.

    p = exp(a - lse),  ds = p (dout . v_n - delta),  dq = scale (sum_n ds k_n + depth's share)

Tiles and key ranges are the forward's: BLOCK_M (token, group) rows of one key/value head.
"""

import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.bands import Bands
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.masks import band_mask, key_range, keys_seen, masked_blocks
from moda_kernels.rows import load_queries, load_rows, tile_rows, tile_tokens
from moda_kernels.softmax import base2_log_p, base2_scores, score_gradient


@triton.jit
def _sum_over_keys(
    dq, q, dout, lse, delta, k_base, v_base, stride_k, stride_v, turn, end_turn, blocks, begin, end, first_token,
    last_token, bands, offs_t, T, S, scale, left, right, softcap, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dq plus sum ds k over blocks of the keys begin..end, from ``turn`` on and past the last one to the first:
    EDGE blocks may hold keys that some rows do not see.
    """
    offs_d = tl.arange(0, q.shape[1])
    offs_dv = tl.arange(0, dout.shape[1])
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
        scores, excess = base2_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, q.dtype)
        log_p = base2_log_p(scores, excess, lse[:, None], q.dtype)  # [BLOCK_M, BLOCK_N]
        if EDGE:
            seen = band_mask(bands, offs_t[:, None], offs_n[None, :], T, S, left, right)
            log_p = tl.where(seen, log_p, float("-inf"))
        p = tl.exp2(log_p)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = score_gradient(p, dp, delta[:, None], scores, softcap)
        if EDGE:
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["T", "S", "left", "right"])
def _moda_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_depth_ptr, dq_ptr, bands,
    q_strides, k_strides, v_strides, dout_strides, scale, left, right, softcap, B, T, S, H,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    tile = tl.cdiv(T * G, BLOCK_M) - 1 - tl.program_id(0) // (B * H)  # longest causal rows first
    head = tl.program_id(0) % (B * H)
    b, j, offs_t, h, row_ok = tile_rows(tile, head, T, H, G, BLOCK_M)
    t = offs_t.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q, dout, lse, delta = load_queries(
        q_ptr + b * q_strides[0], dout_ptr + b * dout_strides[0], lse_ptr + b * H * G * T, delta_ptr + b * H * G * T,
        q_strides, dout_strides, t, h, row_ok, T, offs_d, offs_dv, D, DV,
    )  # fmt: skip
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    k_base = k_ptr + b * k_strides[0] + j * k_strides[2]
    v_base = v_ptr + b * v_strides[0] + j * v_strides[2]
    first_token, last_token = tile_tokens(tile, T, G, BLOCK_M)
    begin, inner_begin, inner_end, end = key_range(bands, first_token, last_token, T, S, left, right, BLOCK_N)
    blocks, first, last = masked_blocks(begin, inner_begin, inner_end, end, BLOCK_N)
    dq = _sum_over_keys(
        dq, q, dout, lse, delta, k_base, v_base, k_strides[1], v_strides[1], last, blocks + first, blocks, begin, end,
        first_token, last_token, bands, offs_t, T, S, scale, left, right, softcap, D, DV, BLOCK_N, True,
    )  # fmt: skip
    dq = _sum_over_keys(
        dq, q, dout, lse, delta, k_base, v_base, k_strides[1], v_strides[1], first, last, blocks, begin, end,
        first_token, last_token, bands, offs_t, T, S, scale, left, right, softcap, D, DV, BLOCK_N, False,
    )  # fmt: skip

    offsets = ((b * T + t) * (H * G) + h)[:, None] * D + offs_d[None, :]
    if dq_depth_ptr is not None:
        dq += load_rows(dq_depth_ptr + offsets, row_ok, offs_d, D)
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offsets, dq, mask=row_ok[:, None] & (offs_d < D)[None, :])


@cached_launch
def _prepare(p: Problem, q: Layout, k: Layout, v: Layout, dout: Layout, lse: Layout, dq_depth: Layout | None) -> Launch:
    tile = tuning.backward_dq_tile(q.device, q.dtype, p.D, p.DV)
    return Launch(
        _moda_backward_dq_kernel, triton.cdiv(p.T * p.G, tile.BLOCK_M) * p.B * p.H,
        q.strides[:3], k.strides[:3], v.strides[:3], dout.strides[:3],
        p.scale, p.left, p.right, p.softcap, p.B, p.T, p.S, p.H,
        G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV), **tile._asdict(),
    )  # fmt: skip


def launch_dq(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dq_depth: Tensor | None,
    bands: Bands = None,
) -> Tensor:  # fmt: skip
    """dq (B, T, HQ, D) in q's dtype, contiguous."""
    dq = q.new_empty(q.shape)
    _prepare(p, *map(layout, (q, k, v, dout, lse, dq_depth)))(q, k, v, dout, lse, delta, dq_depth, dq, bands)
    return dq
