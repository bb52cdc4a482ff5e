"""Backward without depth, first pass: delta = rowsum(dout * out) - dlse, which every score gradient shares.

With p = exp(score - lse), d out / d score = p (v - out) and d lse / d score = p, so that
ds = p (dout . v - delta). One program reads BLOCK_T tokens of one query head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.rows import load_rows


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "stride_lt", "T"])
def _moda_delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr, dout_strides, out_strides,
    stride_lb, stride_lh, stride_lt, B, T, HQ,
    DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % (B * HQ)
    b = (head // HQ).to(tl.int64)
    h = (head % HQ).to(tl.int64)
    offs_t = tl.program_id(0) // (B * HQ) * BLOCK_T + tl.arange(0, BLOCK_T)
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
        delta -= tl.load(dlse, mask=ok, other=0.0).to(tl.float32)
    tl.store(delta_ptr + (b * HQ + h) * T + offs_t, delta, mask=ok)


@cached_launch
def _prepare(p: Problem, dout: Layout, out: Layout, dlse: Layout | None) -> Launch:
    tile = tuning.BACKWARD_DELTA
    return Launch(
        _moda_delta_kernel, triton.cdiv(p.T, tile.BLOCK_T) * p.B * p.H * p.G,
        dout.strides[:3], out.strides[:3], *(dlse.strides if dlse else (None,) * 3), p.B, p.T, p.H * p.G,
        DV=p.DV, BLOCK_DV=tuning.block_dim(p.DV), **tile._asdict(),
    )  # fmt: skip


def launch_delta(p: Problem, dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """delta (B, HQ, T) in float32, contiguous."""
    delta = out.new_empty(p.B, p.H * p.G, p.T, dtype=torch.float32)
    _prepare(p, layout(dout), layout(out), layout(dlse))(dout, out, dlse, delta)
    return delta
