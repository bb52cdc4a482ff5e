"""The probability that depth slots received, mean over tokens.

    mass[b, h, l] = 1/T sum_t exp(d_l - lse),   d_l = score of slot l at token t

A program owns one key/value head and a run of tokens: for each block of slots it walks over its tokens and
adds the probabilities up, and leaves the sums of its run. Runs are added up afterwards, in a fixed order:
no atomics. A block's depth keys are read once; q again for every block of slots, from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.rows import load_rows
from moda_kernels.slots import DepthLayout, depth_pointers, slot_rows
from moda_kernels.softmax import base2_log_p, base2_scores


@triton.jit(do_not_specialize=["T", "L", "stride_lb", "stride_lh", "stride_lt"])
def _moda_depth_mass_kernel(
    q_ptr, k_depth, lse_ptr, runs_ptr, q_strides, stride_lb, stride_lh, stride_lt, scale, softcap, B, T, L, H,
    RUN: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) // (B * H)
    head = tl.program_id(0) % (B * H)
    b = (head // H).to(tl.int64)
    j = (head % H).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    for first_head in range(0, G, BLOCK_G):
        offs_g = first_head + tl.arange(0, BLOCK_G)
        g_ok = offs_g < G
        h = j * G + offs_g
        for start in range(0, L, BLOCK_L):
            offs_l = start + tl.arange(0, BLOCK_L)
            l_ok = offs_l < L
            acc = tl.zeros([BLOCK_G, BLOCK_L], tl.float32)
            for first in range(run * RUN, tl.minimum(run * RUN + RUN, T), BLOCK_T):
                offs_t = first + tl.arange(0, BLOCK_T)
                t = offs_t.to(tl.int64)[:, None]
                t_ok = offs_t < T
                rows_ok = t_ok[:, None] & g_ok[None, :]
                q_rows = q_ptr + b * q_strides[0] + t * q_strides[1] + h[None, :] * q_strides[2]
                q = load_rows(q_rows[:, :, None] + offs_d[None, None, :], rows_ok, offs_d, D)
                k_rows = slot_rows(k_depth, b, j, offs_t[:, None], offs_l, l_ok, ALIGNED)
                k_ok = t_ok[:, None] & l_ok[None, :]
                k = load_rows(k_rows[:, :, None] + offs_d[None, None, :], k_ok, offs_d, D)
                lse_ptrs = lse_ptr + b * stride_lb + h[None, :] * stride_lh + t * stride_lt
                lse = tl.load(lse_ptrs, mask=rows_ok, other=float("inf"))
                lse = tl.where(lse == float("-inf"), float("inf"), lse)[:, :, None]
                qk = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision="ieee")
                scores, excess = base2_scores(qk, scale, softcap, dtype)  # [BLOCK_T, BLOCK_G, BLOCK_L]
                p = tl.exp2(base2_log_p(scores, excess, lse, dtype))
                acc += tl.sum(tl.where(lse < float("inf"), p, 0.0), 0)  # a row that sees nothing may hold NaN
            sums = runs_ptr + ((tl.cast(run, tl.int64) * B + b) * (H * G) + h[:, None]) * L + offs_l[None, :]
            tl.store(sums, acc / T, mask=g_ok[:, None] & l_ok[None, :])


@cached_launch
def _prepare(p: Problem, q: Layout, lse: Layout, depth: DepthLayout) -> Launch:
    tile = tuning.depth_mass_tile(q.dtype, p.G, p.D)
    return Launch(
        _moda_depth_mass_kernel, triton.cdiv(p.T, tile.RUN) * p.B * p.H,
        q.strides[:3], *lse.strides, p.scale, p.softcap, p.B, p.T, p.L, p.H,
        G=p.G, D=p.D, BLOCK_D=tuning.block_dim(p.D), ALIGNED=depth.aligned, **tile._asdict(),
    )  # fmt: skip


def launch_depth_mass(p: Problem, q: Tensor, k_depth: list[Tensor], lse: Tensor) -> Tensor:
    """(B, HQ, L) in float32, contiguous; T and L >= 1."""
    tile = tuning.depth_mass_tile(q.dtype, p.G, p.D)
    runs = q.new_empty(triton.cdiv(p.T, tile.RUN), p.B, p.H * p.G, p.L, dtype=torch.float32)
    (depth,), depth_layout = depth_pointers(k_depth)
    _prepare(p, layout(q), layout(lse), depth_layout)(q, depth, lse, runs)
    return runs.sum(0)
