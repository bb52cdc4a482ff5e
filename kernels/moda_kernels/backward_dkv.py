"""Backward for the sequence's k and v.

    dv_n = sum p dout,   dk_n = scale sum ds q,   over the (token, group) rows that see key n

plus what later readers of these keys have left, if they have. A program owns BLOCK_N keys of one
key/value head and walks over those rows, BLOCK_M at a time. Where such programs are too few for the GPU,
PARTS of them share the rows, each every PARTS-th token, and leave shares of the gradients, which are then summed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.bands import Bands
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.masks import band_mask, masked_blocks, token_range, tokens_seeing
from moda_kernels.rows import load_queries, load_rows
from moda_kernels.softmax import base2_log_p, base2_scores, score_gradient


@triton.jit
def _store_gradient(grad_ptr, strides, running_ptr, running_strides, grad, b, n, j, n_ok, offs_d, D: tl.constexpr):
    """Write the gradient [BLOCK_N, BLOCK_D] of keys n, plus what is running."""
    if running_ptr is not None:
        rows = running_ptr + b * running_strides[0] + n * running_strides[1] + j * running_strides[2]
        grad += load_rows(rows[:, None] + offs_d[None, :], n_ok, offs_d, D)
    rows = grad_ptr + b * strides[0] + n * strides[1] + j * strides[2]
    mask = n_ok[:, None] & (offs_d < D)[None, :]
    tl.store(rows[:, None] + offs_d[None, :], grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_over_rows(
    dk, dv, k, v, q_base, dout_base, lse_base, delta_base, q_strides, dout_strides, turn, end_turn, blocks, begin, end,
    part, PARTS, bands, offs_n, first_key, last_key, T, S, scale, left, right, softcap, G: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk plus sum ds q and dv plus sum p dout over blocks of the rows begin..end, from ``turn`` on and past the
    last one to the first: EDGE blocks may hold rows that do not see all keys.
    """
    offs_d = tl.arange(0, k.shape[1])
    offs_dv = tl.arange(0, v.shape[1])
    for i in range(turn, end_turn):
        start = begin + (tl.where(i < blocks, i, i - blocks) if EDGE else i) * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        offs_t = rows // G * PARTS + part
        row_ok = rows < end if EDGE else None
        if EDGE and bands is not None:
            row_ok = row_ok & tokens_seeing(bands, offs_t, first_key, last_key, T, S)
        t = offs_t.to(tl.int64)
        g = (rows % G).to(tl.int64)
        q, dout, lse, delta = load_queries(
            q_base, dout_base, lse_base, delta_base, q_strides, dout_strides, t, g, row_ok, T, offs_d, offs_dv, D, DV
        )
        scores, excess = base2_scores(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, k.dtype)
        log_p = base2_log_p(scores, excess, lse[None, :], k.dtype)  # [BLOCK_N, BLOCK_M]
        if EDGE:
            seen = band_mask(bands, offs_t[None, :], offs_n[:, None], T, S, left, right)
            log_p = tl.where(seen, log_p, float("-inf"))
        p = tl.exp2(log_p)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = score_gradient(p, dp, delta[None, :], scores, softcap)
        if EDGE:
            ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "left", "right", "PARTS"])
def _moda_backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, k_running_ptr, v_running_ptr,
    dk_shares_ptr, dv_shares_ptr, bands, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    k_running_strides, v_running_strides, scale, left, right, softcap, B, T, S, H, PARTS,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    start_n = program // (B * H) * BLOCK_N  # the first keys are seen by most rows: longest first
    head = program % (B * H)
    b = (head // H).to(tl.int64)
    j = (head % H).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    n_ok = offs_n < S
    n = offs_n.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    k_rows = k_ptr + b * k_strides[0] + n * k_strides[1] + j * k_strides[2]
    v_rows = v_ptr + b * v_strides[0] + n * v_strides[1] + j * v_strides[2]
    k = load_rows(k_rows[:, None] + offs_d[None, :], n_ok, offs_d, D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_rows[:, None] + offs_dv[None, :], n_ok, offs_dv, DV)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    q_base = q_ptr + b * q_strides[0] + j * G * q_strides[2]
    dout_base = dout_ptr + b * dout_strides[0] + j * G * dout_strides[2]
    lse_base = lse_ptr + (b * H + j) * G * T
    delta_base = delta_ptr + (b * H + j) * G * T

    # Tokens that see any of these keys, [begin, end), and all of them, [inner_begin, inner_end).
    last_n = tl.minimum(start_n + BLOCK_N, S) - 1
    begin, inner_begin, inner_end, end = token_range(bands, start_n, last_n, T, S, left, right)
    # The same as rows of this part's tokens: part, part + PARTS, ...
    begin = tl.cdiv(begin - part, PARTS) * G
    inner_begin = tl.cdiv(inner_begin - part, PARTS) * G
    end = tl.cdiv(end - part, PARTS) * G
    inner_end = tl.cdiv(inner_end - part, PARTS) * G
    blocks, first, last = masked_blocks(begin, inner_begin, inner_end, end, BLOCK_M)
    dk, dv = _sum_over_rows(
        dk, dv, k, v, q_base, dout_base, lse_base, delta_base, q_strides, dout_strides, last, blocks + first, blocks,
        begin, end, part, PARTS, bands, offs_n, start_n, last_n, T, S, scale, left, right, softcap, G, D, DV, BLOCK_M,
        True,
    )  # fmt: skip
    dk, dv = _sum_over_rows(
        dk, dv, k, v, q_base, dout_base, lse_base, delta_base, q_strides, dout_strides, first, last, blocks,
        begin, end, part, PARTS, bands, offs_n, start_n, last_n, T, S, scale, left, right, softcap, G, D, DV, BLOCK_M,
        False,
    )  # fmt: skip

    dk *= scale
    if PARTS == 1:
        _store_gradient(dk_ptr, dk_strides, k_running_ptr, k_running_strides, dk, b, n, j, n_ok, offs_d, D)
        _store_gradient(dv_ptr, dv_strides, v_running_ptr, v_running_strides, dv, b, n, j, n_ok, offs_dv, DV)
    else:
        share = (((b * S + n) * H + j) * PARTS + part)[:, None]
        tl.store(dk_shares_ptr + share * D + offs_d[None, :], dk, mask=n_ok[:, None] & (offs_d < D)[None, :])
        tl.store(dv_shares_ptr + share * DV + offs_dv[None, :], dv, mask=n_ok[:, None] & (offs_dv < DV)[None, :])


@cached_launch
def _prepare(
    p: Problem, q: Layout, k: Layout, v: Layout, dout: Layout, lse: Layout, dk: Layout, dv: Layout,
    k_running: Layout | None, v_running: Layout | None, parts: int,
) -> Launch:  # fmt: skip
    tile = tuning.backward_dkv_tile(q.device, q.dtype, p.D, p.DV)
    layouts = q, k, v, dout, dk, dv, k_running, v_running
    return Launch(
        _moda_backward_dkv_kernel, triton.cdiv(p.S, tile.BLOCK_N) * p.B * p.H * parts,
        *(x and x.strides[:3] for x in layouts), p.scale, p.left, p.right, p.softcap, p.B, p.T, p.S, p.H, parts,
        G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV), **tile._asdict(),
    )  # fmt: skip


def launch_dkv(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    k_running: Tensor | None, v_running: Tensor | None, bands: Bands = None,
) -> None:  # fmt: skip
    """Write dk (B, S, H, D) and dv (B, S, H, DV), plus what is running."""
    tile = tuning.backward_dkv_tile(q.device, q.dtype, p.D, p.DV)
    parts = tuning.backward_dkv_parts(q.device, triton.cdiv(p.S, tile.BLOCK_N) * p.B * p.H, p.T * p.G)
    shares = [delta, delta]  # stand in where the kernel writes none
    if parts > 1:
        shares = [x.new_empty(p.B, p.S, p.H, parts, x.shape[3], dtype=torch.float32) for x in (dk, dv)]
    launch = _prepare(p, *map(layout, (q, k, v, dout, lse, dk, dv, k_running, v_running)), parts)
    launch(q, k, v, dout, lse, delta, dk, dv, k_running, v_running, *shares, bands)
    if parts > 1:
        for grad, share, running in zip((dk, dv), shares, (k_running, v_running), strict=True):
            total = share.sum(3)
            grad.copy_(total if running is None else total.add_(running))
