"""Backward over depth: dk_depth, dv_depth, and depth's share of dq, reading each depth row once.

    p = exp(d - lse),  ds = p (dout . v_l - delta),  delta = dout . out - dlse
    dv_l = sum_g p dout_g,   dk_l = scale sum_g ds q_g,   dq_g += scale sum_l ds k_l

dk and dv plus what later readers of the slot have left, if they have. Slot l of token t is read by the
G query heads of that token alone, so one program owns a tile of tokens of one key/value head, walks
over the slots, and adds the heads up itself: no atomics. All products are matrix products batched over
the tile's tokens, transposed ([slot, head]) so that the sums over heads need no further transposition.
Depth's share of dq is float32 and unscaled. Of a group that goes by in one part dq can also be FINISHED:
scaled, in q's dtype, and with the sequence's share, where ``dq_sequence`` is its (pointer, strides); and delta
is found here, where dout is at hand, and left for the sequence's passes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.backward_delta import launch_delta
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.rows import load_rows
from moda_kernels.slots import DepthLayout, depth_pointers, slot_rows
from moda_kernels.softmax import base2_log_p, base2_scores, score_gradient


@triton.jit
def _load_heads(
    q_base, dout_base, lse_base, stride_qh, stride_doh, T, offs_t, offs_g, offs_d, offs_dv,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """q, dout [BLOCK_T, BLOCK_G, ..] and lse [BLOCK_T, BLOCK_G] of some heads of the group."""
    ok = (offs_t < T)[:, None] & (offs_g < G)[None, :]
    g = offs_g.to(tl.int64)[None, :]
    q = load_rows((q_base + g * stride_qh)[:, :, None] + offs_d[None, None, :], ok, offs_d, D)
    dout_ptrs = (dout_base + g * stride_doh)[:, :, None] + offs_dv[None, None, :]
    dout = load_rows(dout_ptrs, ok, offs_dv, DV)
    lse = tl.load(lse_base + g * T + offs_t[:, None], mask=ok, other=float("inf"))
    return q, dout, lse


@triton.jit
def _delta(
    dout, out_ptr, dlse_ptr, delta_base, out_strides, stride_lb, stride_lh, stride_lt, b, j, T, offs_t, offs_g, offs_dv,
    G: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dout . out - dlse [BLOCK_T, BLOCK_G] of the heads of the group, also stored."""
    ok = (offs_t < T)[:, None] & (offs_g < G)[None, :]
    t = offs_t.to(tl.int64)[:, None]
    g = offs_g.to(tl.int64)[None, :]
    out_rows = out_ptr + b * out_strides[0] + t * out_strides[1] + (j * G + g) * out_strides[2]
    out = load_rows(out_rows[:, :, None] + offs_dv[None, None, :], ok, offs_dv, DV)
    delta = tl.sum(out.to(tl.float32) * dout, 2)
    if dlse_ptr is not None:
        dlse = dlse_ptr + b * stride_lb + (j * G + g) * stride_lh + t * stride_lt
        delta -= tl.load(dlse, mask=ok, other=0.0).to(tl.float32)
    tl.store(delta_base + g * T + t, delta, mask=ok)
    return delta


@triton.jit
def _store_gradient(
    depth, running, grad, b, j, offs_t, offs_l, l_ok, ok, offs_d, D: tl.constexpr, ALIGNED: tl.constexpr
):
    """Write the gradient [BLOCK_T, BLOCK_L, BLOCK_D] of a block of slots, plus what is running."""
    if running is not None:
        rows = slot_rows(running, b, j, offs_t[:, None], offs_l, l_ok, ALIGNED)
        grad += load_rows(rows[:, :, None] + offs_d[None, None, :], ok, offs_d, D)
    rows = slot_rows(depth, b, j, offs_t[:, None], offs_l, l_ok, ALIGNED)
    mask = ok[:, :, None] & (offs_d < D)[None, None, :]
    tl.store(rows[:, :, None] + offs_d[None, None, :], grad.to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "L", "stride_lb", "stride_lh", "stride_lt"])
def _moda_backward_depth_kernel(
    q_ptr, dout_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr, dq_sequence, k_depth, v_depth, dk_depth, dv_depth,
    k_running, v_running, q_strides, dout_strides, out_strides, stride_lb, stride_lh, stride_lt, scale, softcap, B, T, L, H,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGNED: tl.constexpr,
    FINISHED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % (B * H)
    b = (head // H).to(tl.int64)
    j = (head % H).to(tl.int64)
    offs_t = tl.program_id(0) // (B * H) * BLOCK_T + tl.arange(0, BLOCK_T)
    t = offs_t.to(tl.int64)[:, None]
    offs_g = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q_base = q_ptr + b * q_strides[0] + t * q_strides[1] + j * G * q_strides[2]  # [BLOCK_T, 1]
    dout_base = dout_ptr + b * dout_strides[0] + t * dout_strides[1] + j * G * dout_strides[2]
    lse_base = lse_ptr + (b * H + j) * G * T
    delta_base = delta_ptr + (b * H + j) * G * T
    dq_base = dq_ptr + ((b * T + t) * H + j) * G * D

    ONE_PASS: tl.constexpr = G <= BLOCK_G  # else a wide group goes by in parts, for each slot block
    if ONE_PASS:
        dq = tl.zeros([BLOCK_T, BLOCK_G, BLOCK_D], tl.float32)
        q, dout, lse = _load_heads(
            q_base, dout_base, lse_base, q_strides[2], dout_strides[2], T, offs_t, offs_g, offs_d, offs_dv, G, D, DV
        )
        delta = _delta(
            dout, out_ptr, dlse_ptr, delta_base, out_strides, stride_lb, stride_lh, stride_lt, b, j, T, offs_t, offs_g,
            offs_dv, G, DV,
        )  # fmt: skip
    for start in range(0, L, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        l_ok = offs_l < L
        ok = (offs_t < T)[:, None] & l_ok[None, :]
        k_rows = slot_rows(k_depth, b, j, offs_t[:, None], offs_l, l_ok, ALIGNED)
        v_rows = slot_rows(v_depth, b, j, offs_t[:, None], offs_l, l_ok, ALIGNED)
        k = load_rows(k_rows[:, :, None] + offs_d[None, None, :], ok, offs_d, D)
        v = load_rows(v_rows[:, :, None] + offs_dv[None, None, :], ok, offs_dv, DV)
        dk = tl.zeros([BLOCK_T, BLOCK_L, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_T, BLOCK_L, BLOCK_DV], tl.float32)
        for g in range(0, G, BLOCK_G):
            if not ONE_PASS:
                q, dout, lse = _load_heads(
                    q_base, dout_base, lse_base, q_strides[2], dout_strides[2], T, offs_t, g + offs_g, offs_d, offs_dv,
                    G, D, DV,
                )  # fmt: skip
                heads = g + offs_g[None, :]
                heads_ok = (offs_t < T)[:, None] & (heads < G)
                delta = tl.load(delta_base + heads * T + offs_t[:, None], mask=heads_ok, other=0.0)
            qk = tl.dot(k, tl.permute(q, (0, 2, 1)), input_precision="ieee")
            scores, excess = base2_scores(qk, scale, softcap, dtype)  # [BLOCK_T, BLOCK_L, BLOCK_G]
            log_p = base2_log_p(scores, excess, lse[:, None, :], dtype)
            p = tl.exp2(tl.where(l_ok[None, :, None], log_p, float("-inf")))
            dp = tl.dot(v, tl.permute(dout, (0, 2, 1)), input_precision="ieee")
            ds = score_gradient(p, dp, delta[:, None, :], scores, softcap).to(dtype)
            dv = tl.dot(p.to(dtype), dout, dv, input_precision="ieee")
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            share = tl.dot(tl.permute(ds, (0, 2, 1)), k, input_precision="ieee")
            if ONE_PASS:
                dq += share
            else:
                dq_ptrs = (dq_base + (g + offs_g)[None, :] * D)[:, :, None] + offs_d[None, None, :]
                dq_ok = (offs_t < T)[:, None] & (g + offs_g < G)[None, :]
                if start > 0:
                    share += load_rows(dq_ptrs, dq_ok, offs_d, D)
                tl.store(dq_ptrs, share, mask=dq_ok[:, :, None] & (offs_d < D)[None, None, :])
                tl.debug_barrier()  # other threads may read these rows for the next slot block
        _store_gradient(dk_depth, k_running, dk * scale, b, j, offs_t, offs_l, l_ok, ok, offs_d, D, ALIGNED)
        _store_gradient(dv_depth, v_running, dv, b, j, offs_t, offs_l, l_ok, ok, offs_dv, DV, ALIGNED)
    if ONE_PASS:
        dq_ptrs = (dq_base + offs_g[None, :] * D)[:, :, None] + offs_d[None, None, :]
        dq_ok = (offs_t < T)[:, None] & (offs_g < G)[None, :]
        if FINISHED:
            dq *= scale
        if dq_sequence is not None:
            dq_rows = dq_sequence[0] + b * dq_sequence[1] + t * dq_sequence[2] + j * G * dq_sequence[3]
            dq_rows = dq_rows + offs_g.to(tl.int64)[None, :] * dq_sequence[3]
            dq += load_rows(dq_rows[:, :, None] + offs_d[None, None, :], dq_ok, offs_d, D)
        tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=dq_ok[:, :, None] & (offs_d < D)[None, None, :])


@cached_launch
def _prepare(
    p: Problem, q: Layout, dout: Layout, out: Layout, lse: Layout, dlse: Layout | None, dq_sequence: Layout | None,
    depth: DepthLayout, finished: bool,
) -> Launch:  # fmt: skip
    tile = tuning.backward_depth_tile(q.dtype, p.G, p.D, p.DV)
    return Launch(
        _moda_backward_depth_kernel, triton.cdiv(p.T, tile.BLOCK_T) * p.B * p.H,
        q.strides[:3], dout.strides[:3], out.strides[:3], *(dlse.strides if dlse else (None,) * 3),
        p.scale, p.softcap, p.B, p.T, p.L, p.H,
        G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV),
        ALIGNED=depth.aligned, FINISHED=finished, **tile._asdict(),
    )  # fmt: skip


def launch_backward_depth(
    p: Problem, q: Tensor, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, *depths: Any,
    dq_sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq (B, T, HQ, D) and delta, both contiguous; L >= 1. dq is depth's unscaled share in float32, or, on top
    of the sequence's or if S = 0, all of it.

    ``depths`` are k_depth, v_depth and their gradients, which this writes, then, if there are any, those of
    later readers.
    """
    depth, depth_layout = depth_pointers(*depths)
    one_part = p.G <= tuning.backward_depth_tile(q.dtype, p.G, p.D, p.DV).BLOCK_G
    finished = one_part and (dq_sequence is not None or p.S == 0)
    dq = q.new_empty(q.shape, dtype=q.dtype if finished else torch.float32)
    share = None if dq_sequence is None else (dq_sequence, *dq_sequence.stride()[:3])
    if one_part:
        delta = out.new_empty(p.B, p.H * p.G, p.T, dtype=torch.float32)
    else:
        delta = launch_delta(p, dout, out, dlse)
    tensors = q, dout, out, lse, dlse, dq_sequence
    launch = _prepare(p, *map(layout, tensors), depth_layout, finished)
    launch(q, dout, out, lse, dlse, delta, dq, share, *depth, *[None] * (6 - len(depth)))
    if p.S == 0 and not finished:
        dq = dq.mul_(p.scale).to(q.dtype)
    return dq, delta
