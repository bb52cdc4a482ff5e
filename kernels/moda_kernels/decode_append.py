"""Append: each sequence's new keys and values go to the end of its part of the caches.

    k_cache[b, len_b + t] = k_new[b, t],   v_cache[b, len_b + t] = v_new[b, t]

in a paged cache at [block_table[b, n // page_size], n % page_size] for n = len_b + t. A token for which
there is no room, or no page, is dropped. A program owns BLOCK_R (sequence, token, head) rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.common import cache_places, load_rows
from moda_kernels.prepared import Launch, Layout, Problem, layout, prepared


@triton.jit(do_not_specialize=["table_stride", "B", "T", "S", "pages"])
def _moda_decode_append_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, seqlens_ptr, table_ptr,
    k_new_strides, v_new_strides, k_strides, v_strides, table_stride, B, T, S, H, pages,
    D: tl.constexpr, DV: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = rows // (T * H)
    t = rows // H % T
    j = rows % H
    row_ok = b < B
    positions = tl.load(seqlens_ptr + b, mask=row_ok, other=0) + t.to(tl.int32)
    fits = row_ok & (positions >= 0) & (positions < S)
    page, place, fits = cache_places(table_ptr, table_stride, b, positions, fits, pages, PAGE_SIZE)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)

    k_rows = k_new_ptr + b * k_new_strides[0] + t * k_new_strides[1] + j * k_new_strides[2]
    k = load_rows(k_rows[:, None] + offs_d[None, :], fits, offs_d, D)  # [BLOCK_R, BLOCK_D]
    k_rows = k_ptr + page * k_strides[0] + place * k_strides[1] + j * k_strides[2]
    tl.store(k_rows[:, None] + offs_d[None, :], k, mask=fits[:, None] & (offs_d < D)[None, :])
    v_rows = v_new_ptr + b * v_new_strides[0] + t * v_new_strides[1] + j * v_new_strides[2]
    v = load_rows(v_rows[:, None] + offs_dv[None, :], fits, offs_dv, DV)
    v_rows = v_ptr + page * v_strides[0] + place * v_strides[1] + j * v_strides[2]
    tl.store(v_rows[:, None] + offs_dv[None, :], v, mask=fits[:, None] & (offs_dv < DV)[None, :])


@prepared
def _prepare(
    p: Problem, k_new: Layout, v_new: Layout, k: Layout, v: Layout, seqlens: Layout, table: Layout | None
) -> Launch:
    BLOCK_R = 16
    return Launch(
        _moda_decode_append_kernel, triton.cdiv(p.B * p.T * p.H, BLOCK_R),
        k_new.strides[:3], v_new.strides[:3], k.strides[:3], v.strides[:3], table.strides[0] if table else 0,
        p.B, p.T, p.S, p.H, k.shape[0], D=p.D, DV=p.DV, PAGE_SIZE=k.shape[1] if table else 0,
        BLOCK_R=BLOCK_R, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV), num_warps=2,
    )  # fmt: skip


def launch_decode_append(
    p: Problem, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Write k_new (B, T, H, D) and v_new (B, T, H, DV) into the caches, from each one's length on."""
    tensors = k_new, v_new, k_cache, v_cache, cache_seqlens, block_table
    _prepare(p, *map(layout, tensors))(*tensors)
