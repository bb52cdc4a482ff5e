"""Backward, first pass: delta = rowsum(dout * out) - dlse, the term that every score gradient shares.

With p = exp(score - lse), d out / d score = p (v - out) and d lse / d score = p, so that
ds = p (dout . v - delta). One program reads BLOCK_M tokens of one query head.
"""

import triton
import triton.language as tl

from moda_kernels.common import load_rows


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_lt", "T"])
def _moda_delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr, dout_strides, out_strides,
    stride_lb, stride_lh, stride_lt, B, T, HQ,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % (B * HQ)
    b = (head // HQ).to(tl.int64)
    h = (head % HQ).to(tl.int64)
    offs_t = tl.program_id(0) // (B * HQ) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    ok = offs_t < T
    t = offs_t.to(tl.int64)
    dout_rows = dout_ptr + b * dout_strides[0] + t * dout_strides[1] + h * dout_strides[2]
    out_rows = out_ptr + b * out_strides[0] + t * out_strides[1] + h * out_strides[2]
    dout = load_rows(dout_rows[:, None] + offs_dv[None, :], ok, offs_dv, DV).to(tl.float32)
    out = load_rows(out_rows[:, None] + offs_dv[None, :], ok, offs_dv, DV).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if dlse_ptr is not None:
        dlse = dlse_ptr + b * stride_lb + h * stride_lh + t * stride_lt
        delta -= tl.load(dlse, mask=ok, other=0.0)
    tl.store(delta_ptr + (b * HQ + h) * T + offs_t, delta, mask=ok)
