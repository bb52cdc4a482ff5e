"""Backward for q over the depth of a chunk: the share of dq that ``launch_dq`` adds the sequence's to.

    p = exp(d - lse),  ds = p (dout . v_{s,l} - delta),  dq / scale = sum_{s,l} ds k_{s,l}

Tiles and the rows of depth that they see are the forward's, see moda_kernels.forward_chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.masks import chunk_mask
from moda_kernels.rows import load_queries, load_rows, tile_rows
from moda_kernels.slots import DepthLayout, depth_pointers, slot_rows
from moda_kernels.softmax import base2_log_p, base2_scores, score_gradient


@triton.jit(do_not_specialize=["chunk", "T", "L"])
def _moda_backward_chunk_dq_kernel(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, k_depth, v_depth,
    q_strides, dout_strides, scale, softcap, chunk, B, T, L, H,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // (B * H)
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

    first_token = tile * BLOCK_M // G
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // G + 1, T) * L
    for start in range((first_token - first_token % chunk) * L, end, BLOCK_N):
        offs_e = start + tl.arange(0, BLOCK_N)
        ok = offs_e < end
        owners = offs_e // L
        k_rows = slot_rows(k_depth, b, j, owners, offs_e % L, ok, ALIGNED)
        v_rows = slot_rows(v_depth, b, j, owners, offs_e % L, ok, ALIGNED)
        k = load_rows(k_rows[:, None] + offs_d[None, :], ok, offs_d, D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_rows[:, None] + offs_dv[None, :], ok, offs_dv, DV)
        scores, excess = base2_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, q.dtype)
        seen = chunk_mask(offs_t[:, None], owners[None, :], chunk)
        p = tl.exp2(tl.where(seen, base2_log_p(scores, excess, lse[:, None], q.dtype), float("-inf")))  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = score_gradient(p, dp, delta[:, None], scores, softcap)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_rows = dq_ptr + ((b * T + t) * (H * G) + h) * D
    tl.store(dq_rows[:, None] + offs_d[None, :], dq, mask=row_ok[:, None] & (offs_d < D)[None, :])


@cached_launch
def _prepare(p: Problem, q: Layout, dout: Layout, lse: Layout, depth: DepthLayout) -> Launch:
    tile = tuning.backward_dq_tile(q.device, q.dtype, p.D, p.DV)
    return Launch(
        _moda_backward_chunk_dq_kernel, triton.cdiv(p.T * p.G, tile.BLOCK_M) * p.B * p.H,
        q.strides[:3], dout.strides[:3], p.scale, p.softcap, p.chunk, p.B, p.T, p.L, p.H,
        G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV),
        ALIGNED=depth.aligned, **tile._asdict(),
    )  # fmt: skip


def launch_chunk_dq(
    p: Problem, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, k_depth: list[Tensor], v_depth: list[Tensor]
) -> Tensor:
    """Depth's unscaled share of dq (B, T, HQ, D) in float32, contiguous."""
    dq = q.new_empty(q.shape, dtype=torch.float32)
    depth, depth_layout = depth_pointers(k_depth, v_depth)
    _prepare(p, layout(q), layout(dout), layout(lse), depth_layout)(q, dout, lse, delta, dq, *depth)
    return dq
