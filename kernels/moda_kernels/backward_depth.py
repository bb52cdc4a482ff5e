"""Backward over depth: dk_depth, dv_depth, and depth's share of dq, reading each depth row once.

    p = exp(d - lse),  ds = p (dout . v_l - delta)
    dv_l = sum_g p dout_g,   dk_l = scale sum_g ds q_g,   dq_g += scale sum_l ds k_l

Slot l of token t is read by the G query heads of that token alone, so one program owns a tile of
tokens of one key/value head, walks over the slots, and adds the heads up in registers: no atomics.
The share of dq is kept in float32, unscaled, and only this program touches its rows.
"""

import triton
import triton.language as tl

from moda_kernels.common import LOG2E, base2_scores, load_rows, slot_rows, softcap_slope


@triton.jit
def _moda_backward_depth_kernel(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, k_depth, v_depth, dk_depth, dv_depth,
    q_strides, dout_strides, scale, softcap, T, L, H,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    j = (tl.program_id(0) % H).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0) // H * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    t_ok = offs_t < T
    t = offs_t.to(tl.int64)
    for start in range(0, L, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        l_ok = offs_l < L
        ok = t_ok[:, None] & l_ok[None, :]
        k_rows = slot_rows(k_depth, b, j, offs_t[:, None], offs_l, l_ok, dtype, ALIGNED)
        v_rows = slot_rows(v_depth, b, j, offs_t[:, None], offs_l, l_ok, dtype, ALIGNED)
        k = load_rows(k_rows[:, :, None] + offs_d[None, None, :], ok, offs_d, D, True).to(tl.float32)
        v = load_rows(v_rows[:, :, None] + offs_dv[None, None, :], ok, offs_dv, DV, True).to(tl.float32)
        dk = tl.zeros([BLOCK_T, BLOCK_L, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_T, BLOCK_L, BLOCK_DV], tl.float32)
        for g in range(G):
            h = j * G + g
            q_rows = q_ptr + b * q_strides[0] + t * q_strides[1] + h * q_strides[2]
            dout_rows = dout_ptr + b * dout_strides[0] + t * dout_strides[1] + h * dout_strides[2]
            q = load_rows(q_rows[:, None] + offs_d[None, :], t_ok, offs_d, D, True).to(tl.float32)
            dout = load_rows(dout_rows[:, None] + offs_dv[None, :], t_ok, offs_dv, DV, True).to(tl.float32)
            row = (b * H * G + h) * T + offs_t
            lse = tl.load(lse_ptr + row, mask=t_ok, other=float("inf"))
            delta = tl.load(delta_ptr + row, mask=t_ok, other=0.0)

            scores = base2_scores(tl.sum(q[:, None, :] * k, 2), scale, softcap)  # [BLOCK_T, BLOCK_L]
            p = tl.where(l_ok[None, :], tl.exp2(scores - lse[:, None] * LOG2E), 0.0)
            ds = p * (tl.sum(dout[:, None, :] * v, 2) - delta[:, None])
            if softcap is not None:
                ds *= softcap_slope(scores, softcap)
            dk += ds[:, :, None] * q[:, None, :]
            dv += p[:, :, None] * dout[:, None, :]
            dq = tl.sum(ds[:, :, None] * k, 1)  # [BLOCK_T, BLOCK_D]
            dq_ptrs = dq_ptr + ((b * T + t) * (H * G) + h)[:, None] * D + offs_d[None, :]
            if start > 0:
                dq += load_rows(dq_ptrs, t_ok, offs_d, D, True)
            tl.store(dq_ptrs, dq, mask=t_ok[:, None] & (offs_d < D)[None, :])
            tl.debug_barrier()  # the next slot block may read these rows from other threads
        dk_rows = slot_rows(dk_depth, b, j, offs_t[:, None], offs_l, l_ok, dtype, ALIGNED)
        dv_rows = slot_rows(dv_depth, b, j, offs_t[:, None], offs_l, l_ok, dtype, ALIGNED)
        dk_ok = ok[:, :, None] & (offs_d < D)[None, None, :]
        dv_ok = ok[:, :, None] & (offs_dv < DV)[None, None, :]
        tl.store(dk_rows[:, :, None] + offs_d[None, None, :], (dk * scale).to(dtype), mask=dk_ok)
        tl.store(dv_rows[:, :, None] + offs_dv[None, None, :], dv.to(dtype), mask=dv_ok)
