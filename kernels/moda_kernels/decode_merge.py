"""Merge: the softmax over all keys from those over parts of them.

    lse = log sum_s exp lse_s,   out = sum_s e^(lse_s - lse) out_s

A program owns one row (b, t, h) and takes BLOCK_S parts at a time. An empty part has out_s = 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.rows import load_rows
from moda_kernels.softmax import LN2, LOG2E, online_softmax


@triton.jit(do_not_specialize=["B", "T", "splits"])
def _moda_decode_merge_kernel(
    outs_ptr, lses_ptr, out_ptr, lse_ptr, B, T, HQ, splits,
    DV: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // (T * HQ)
    t = row // HQ % T
    h = row % HQ
    lse_row = (b * HQ + h) * T + t
    n_rows = tl.cast(B, tl.int64) * T * HQ
    offs_dv = tl.arange(0, BLOCK_DV)
    m_i = tl.full([1], float("-inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        part_ok = offs_s < splits
        scores = tl.load(lses_ptr + offs_s * n_rows + lse_row, mask=part_ok, other=float("-inf")) * LOG2E
        m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores[None, :], 0.0)
        parts = outs_ptr + (offs_s * n_rows + row) * DV
        part = load_rows(parts[:, None] + offs_dv[None, :], part_ok, offs_dv, DV)  # [BLOCK_S, BLOCK_DV]
        acc = acc * alpha[:, None] + tl.sum(tl.trans(p) * part, 0, keep_dims=True)
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    columns = offs_dv[None, :]
    tl.store(out_ptr + row * DV + columns, (acc / l_safe[:, None]).to(out_ptr.dtype.element_ty), mask=columns < DV)
    tl.store(lse_ptr + lse_row + tl.arange(0, 1), (m_i + tl.log2(l_safe)) * LN2)


@cached_launch
def _prepare(p: Problem, splits: int, out: Layout) -> Launch:
    tile = tuning.decode_merge_tile(p.DV)
    return Launch(
        _moda_decode_merge_kernel, p.B * p.T * p.H * p.G, p.B, p.T, p.H * p.G, splits,
        DV=p.DV, BLOCK_DV=tuning.block_dim(p.DV), **tile._asdict(),
    )  # fmt: skip


def launch_decode_merge(
    p: Problem, outs: Tensor, lses: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out (B, T, HQ, DV) in ``dtype`` and lse (B, HQ, T), from outs and lses with an axis of splits before."""
    out = outs.new_empty(outs.shape[1:], dtype=dtype)
    lse = lses.new_empty(lses.shape[1:])
    _prepare(p, len(outs), layout(out))(outs, lses, out, lse)
    return out, lse
