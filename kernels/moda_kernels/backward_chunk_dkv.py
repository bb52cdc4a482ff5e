"""Backward for the depth of a chunk, k and v.

    dv_{s,l} = sum p dout,   dk_{s,l} = scale sum ds q,   over the rows of tokens s..end of s's chunk

A program owns BLOCK_N rows e = s * L + l of depth, of one key/value head, and walks over the
(token, group) rows that see any of them, BLOCK_M at a time: it adds them up itself, without atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.masks import chunk_mask
from moda_kernels.rows import load_queries, load_rows
from moda_kernels.slots import DepthLayout, depth_pointers, slot_rows
from moda_kernels.softmax import base2_log_p, base2_scores, score_gradient


@triton.jit(do_not_specialize=["chunk", "T", "L"])
def _moda_backward_chunk_dkv_kernel(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, k_depth, v_depth, dk_depth, dv_depth,
    q_strides, dout_strides, scale, softcap, chunk, B, T, L, H,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    start_e = tl.program_id(0) // (B * H) * BLOCK_N
    head = tl.program_id(0) % (B * H)
    b = (head // H).to(tl.int64)
    j = (head % H).to(tl.int64)
    offs_e = start_e + tl.arange(0, BLOCK_N)
    ok = offs_e < T * L
    owners = offs_e // L
    slots = offs_e % L
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_rows = slot_rows(k_depth, b, j, owners, slots, ok, ALIGNED)
    v_rows = slot_rows(v_depth, b, j, owners, slots, ok, ALIGNED)
    k = load_rows(k_rows[:, None] + offs_d[None, :], ok, offs_d, D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_rows[:, None] + offs_dv[None, :], ok, offs_dv, DV)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    q_base = q_ptr + b * q_strides[0] + j * G * q_strides[2]
    dout_base = dout_ptr + b * dout_strides[0] + j * G * dout_strides[2]
    lse_base = lse_ptr + (b * H + j) * G * T
    delta_base = delta_ptr + (b * H + j) * G * T
    last_owner = (tl.minimum(start_e + BLOCK_N, T * L) - 1) // L
    end = tl.minimum(last_owner - last_owner % chunk + chunk, T) * G
    for start in range(start_e // L * G, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_ok = rows < end
        offs_t = rows // G
        t = offs_t.to(tl.int64)
        g = (rows % G).to(tl.int64)
        q, dout, lse, delta = load_queries(
            q_base, dout_base, lse_base, delta_base, q_strides, dout_strides, t, g, row_ok, T, offs_d, offs_dv, D, DV
        )
        scores, excess = base2_scores(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, q.dtype)
        seen = chunk_mask(offs_t[None, :], owners[:, None], chunk)
        p = tl.exp2(tl.where(seen, base2_log_p(scores, excess, lse[None, :], q.dtype), float("-inf")))  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = score_gradient(p, dp, delta[None, :], scores, softcap)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk_rows = slot_rows(dk_depth, b, j, owners, slots, ok, ALIGNED)
    dv_rows = slot_rows(dv_depth, b, j, owners, slots, ok, ALIGNED)
    dk = (dk * scale).to(dk_rows.dtype.element_ty)
    tl.store(dk_rows[:, None] + offs_d[None, :], dk, mask=ok[:, None] & (offs_d < D)[None, :])
    tl.store(dv_rows[:, None] + offs_dv[None, :], dv.to(dv_rows.dtype.element_ty), mask=ok[:, None] & (offs_dv < DV)[None, :])


@cached_launch
def _prepare(p: Problem, q: Layout, dout: Layout, lse: Layout, depth: DepthLayout) -> Launch:
    tile = tuning.backward_dkv_tile(q.device, q.dtype, p.D, p.DV)
    return Launch(
        _moda_backward_chunk_dkv_kernel, triton.cdiv(p.T * p.L, tile.BLOCK_N) * p.B * p.H,
        q.strides[:3], dout.strides[:3], p.scale, p.softcap, p.chunk, p.B, p.T, p.L, p.H,
        G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV),
        ALIGNED=depth.aligned, **tile._asdict(),
    )  # fmt: skip


def launch_chunk_dkv(
    p: Problem, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, k_depth: list[Tensor], v_depth: list[Tensor],
    dk_depth: list[Tensor], dv_depth: list[Tensor],
) -> None:  # fmt: skip
    """Write dk_depth and dv_depth."""
    depth, depth_layout = depth_pointers(k_depth, v_depth, dk_depth, dv_depth)
    _prepare(p, layout(q), layout(dout), layout(lse), depth_layout)(q, dout, lse, delta, *depth)
