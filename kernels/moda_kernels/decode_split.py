"""Decoding: few new tokens against a long cache, whose keys are split over programs.

A program owns BLOCK_M (token, group) rows of one key/value head and one of ``splits`` parts of what these
see, both of the cache's keys and of the depth slots, and leaves that part's softmax:

    lse_s = log( sum_n exp a_n + sum_l exp d_l ),   out_s = sum_n e^(a_n - lse_s) v_n + sum_l e^(d_l - lse_s) v_l

for moda_kernels.decode_merge to put together; with one split they are the result. A part is a share of a
sequence's actual length, read on the device, so that the launch is the same for all lengths. A part that
is empty has lse_s = -inf and out_s = 0.

New keys and values go to the end of the sequence first, k_cache[b, len_b + t] = k_new[b, t], each written by
the programs that will read it: every token sees itself, so none is left out, and a program that waits for
its own writes need not wait for another's. A token for which there is no room, or no page, is dropped.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.forward_depth import attend_depth
from moda_kernels.launch import Launch, Layout, Problem, cached_launch, layout
from moda_kernels.masks import band_mask, key_range
from moda_kernels.rows import load_rows, tile_rows, tile_tokens
from moda_kernels.slots import DepthLayout, depth_pointers, skip_slots
from moda_kernels.softmax import base2_scores, natural_lse, online_softmax

FARTHEST: tl.constexpr = tl.constexpr(2**30)
"""The last position that a length may say: sums of positions stay within 32 bits."""


@triton.jit
def cache_places(table_ptr, table_stride, b, positions, ok, pages, PAGE_SIZE: tl.constexpr):
    """Where positions of sequence b lie on the first two axes of a cache, and which of those ok do.

    ``table_ptr`` is None for a cache with one row of positions per sequence. Else it leads to the pages
    of each sequence; entries of positions that are not ok are not read, and a page that does not exist
    holds nothing.
    """
    if table_ptr is None:
        return b, tl.cast(positions, tl.int64), ok
    else:
        page = tl.load(table_ptr + b * table_stride + positions // PAGE_SIZE, mask=ok, other=-1)
        there = (page >= 0) & (page < pages)
        return page.to(tl.int64), tl.cast(positions % PAGE_SIZE, tl.int64), there


@triton.jit
def _append(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, k_new_strides, v_new_strides, k_strides, v_strides, table_ptr, table_stride,
    pages, b, j, origin, begin, end, T, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Write the new tokens, at origin.., whose positions are begin..end."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start in range(0, T, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        positions = origin + offs_t
        fits = (offs_t < T) & (positions >= begin) & (positions < end)
        page, place, fits = cache_places(table_ptr, table_stride, b, positions, fits, pages, PAGE_SIZE)
        t = offs_t.to(tl.int64)
        k_rows = k_new_ptr + b * k_new_strides[0] + t * k_new_strides[1] + j * k_new_strides[2]
        k = load_rows(k_rows[:, None] + offs_d[None, :], fits, offs_d, D)  # [BLOCK_T, BLOCK_D]
        k_rows = k_ptr + page * k_strides[0] + place * k_strides[1] + j * k_strides[2]
        tl.store(k_rows[:, None] + offs_d[None, :], k, mask=fits[:, None] & (offs_d < D)[None, :])
        v_rows = v_new_ptr + b * v_new_strides[0] + t * v_new_strides[1] + j * v_new_strides[2]
        v = load_rows(v_rows[:, None] + offs_dv[None, :], fits, offs_dv, DV)
        v_rows = v_ptr + page * v_strides[0] + place * v_strides[1] + j * v_strides[2]
        tl.store(v_rows[:, None] + offs_dv[None, :], v, mask=fits[:, None] & (offs_dv < DV)[None, :])
    tl.debug_barrier()


@triton.jit
def _few_pages(
    table_ptr, table_stride, pages, b, start, lowest, end, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr
):
    """``cache_places`` of a block that is whole pages, or within one: scalar loads of their ids, after which
    the compiler still overlaps loads of keys with products; after a gather of ids it does not.
    """
    block = tl.arange(0, BLOCK_N)
    page = tl.zeros([BLOCK_N], tl.int64)
    there = block < 0
    for i in tl.static_range((BLOCK_N + PAGE_SIZE - 1) // PAGE_SIZE):
        first = tl.cast(start, tl.int32) + i * PAGE_SIZE
        read = (first < end) & (first + PAGE_SIZE > lowest)
        page_i, _, there_i = cache_places(table_ptr, table_stride, b, first, read, pages, PAGE_SIZE)
        here = block // PAGE_SIZE == i
        page = tl.where(here, page_i, page)
        there = tl.where(here, there_i, there)
    return page, ((start + block) % PAGE_SIZE).to(tl.int64), there


@triton.jit
def _attend_cache(
    q, m_i, l_i, acc, k_ptr, v_ptr, k_strides, v_strides, table_ptr, table_stride, pages, b, j, begin, lowest, end,
    positions, scale, left, softcap, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """The online softmax over the blocks of keys from begin on; only keys lowest..end are read."""
    offs_d = tl.arange(0, q.shape[1])
    offs_dv = tl.arange(0, acc.shape[1])
    block = tl.arange(0, BLOCK_N)
    WHOLE_PAGES: tl.constexpr = PAGE_SIZE >= 16 and (PAGE_SIZE % BLOCK_N == 0 or BLOCK_N % PAGE_SIZE == 0)
    for start in range(begin, end, BLOCK_N):
        offs_n = start + block
        key_ok = (offs_n >= lowest) & (offs_n < end)
        if WHOLE_PAGES:
            page, place, there = _few_pages(
                table_ptr, table_stride, pages, b, start, lowest, end, BLOCK_N, PAGE_SIZE
            )
            key_ok = key_ok & there
        else:
            page, place, key_ok = cache_places(table_ptr, table_stride, b, offs_n, key_ok, pages, PAGE_SIZE)
        k_rows = k_ptr + page * k_strides[0] + place * k_strides[1] + j * k_strides[2]
        v_rows = v_ptr + page * v_strides[0] + place * v_strides[1] + j * v_strides[2]
        k = load_rows(k_rows[:, None] + offs_d[None, :], key_ok, offs_d, D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_rows[:, None] + offs_dv[None, :], key_ok, offs_dv, DV)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        seen = band_mask(None, positions[:, None], offs_n[None, :], end, end, left, 0) & key_ok[None, :]
        scores, excess = base2_scores(qk, scale, softcap, q.dtype)
        scores = tl.where(seen, scores, float("-inf"))
        m_i, l_i, alpha, p = online_softmax(m_i, l_i, scores, excess)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["table_stride", "left", "B", "T", "S", "L", "pages", "splits"])
def _moda_decode_split_kernel(
    q_ptr, k_ptr, v_ptr, k_depth, v_depth, k_new_ptr, v_new_ptr, seqlens_ptr, table_ptr, outs_ptr, lses_ptr,
    q_strides, k_strides, v_strides, k_new_strides, v_new_strides, table_stride, scale, left, softcap,
    B, T, S, L, H, pages, splits,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, DEPTH_DOT: tl.constexpr, DEPTH_STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T * G, BLOCK_M)
    tile = tl.program_id(0) % tiles  # side by side: those that read the same keys
    split = tl.program_id(0) // tiles % splits
    head = tl.program_id(0) // tiles // splits
    b, j, offs_t, query_head, row_ok = tile_rows(tile, head, T, H, G, BLOCK_M)
    first_token, last_token = tile_tokens(tile, T, G, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)

    q_rows = q_ptr + b * q_strides[0] + offs_t.to(tl.int64) * q_strides[1] + query_head * q_strides[2]
    q = load_rows(q_rows[:, None] + offs_d[None, :], row_ok, offs_d, D)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    origin = tl.load(seqlens_ptr + b)  # the first token's position
    origin = tl.minimum(tl.maximum(origin, -FARTHEST // 2), FARTHEST)
    if k_new_ptr is None:
        origin -= T
    first = origin + first_token
    begin, _, _, end = key_range(None, first, origin + last_token, S, S, left, 0, BLOCK_N)
    lowest = 0 if left is None else first - left
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    begin += split * share
    end = tl.minimum(begin + share, end)
    if k_new_ptr is not None:
        if (origin < end) & (origin + T > begin):
            _append(
                k_new_ptr, v_new_ptr, k_ptr, v_ptr, k_new_strides, v_new_strides, k_strides, v_strides,
                table_ptr, table_stride, pages, b, j, origin, begin, end, T, D, DV, BLOCK_D, BLOCK_DV, BLOCK_T, PAGE_SIZE,
            )  # fmt: skip
    m_i, l_i, acc = _attend_cache(
        q, m_i, l_i, acc, k_ptr, v_ptr, k_strides, v_strides, table_ptr, table_stride, pages, b, j,
        begin, lowest, end, origin + offs_t, scale, left, softcap, D, DV, BLOCK_N, PAGE_SIZE,
    )  # fmt: skip

    if k_depth is not None:
        share_l = tl.cdiv(tl.cdiv(L, splits), BLOCK_L) * BLOCK_L
        first_slot = (splits - 1 - split) * share_l  # the last splits have the fewest keys
        m_i, l_i, acc = attend_depth(
            q, m_i, l_i, acc, (skip_slots(k_depth, first_slot), k_depth[1]), (skip_slots(v_depth, first_slot), v_depth[1]),
            b, j, tile, T, tl.minimum(L - first_slot, share_l), scale, softcap,
            G, D, DV, BLOCK_L, DEPTH_DOT, DEPTH_STAGES, ALIGNED,
        )  # fmt: skip

    l_safe = tl.where(l_i == 0.0, 1.0, l_i)  # a row that saw nothing: out = 0, lse = -inf
    part = split.to(tl.int64) * B + b
    out_rows = outs_ptr + ((part * T + offs_t) * (H * G) + query_head) * DV
    tl.store(
        out_rows[:, None] + offs_dv[None, :],
        (acc / l_safe[:, None]).to(outs_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (offs_dv < DV)[None, :],
    )
    tl.store(lses_ptr + (part * H * G + query_head) * T + offs_t, natural_lse(m_i, l_safe, q.dtype), mask=row_ok)


@cached_launch
def _prepare(
    p: Problem, tile: tuning.Tile, splits: int, q: Layout, k: Layout, v: Layout, k_new: Layout | None,
    v_new: Layout | None, seqlens: Layout, table: Layout | None, depth: DepthLayout,
) -> Launch:  # fmt: skip
    depth_tile = tuning.decode_depth(q.device, q.dtype, p.G, p.D, p.DV, tile.BLOCK_M)
    return Launch(
        _moda_decode_split_kernel, triton.cdiv(p.T * p.G, tile.BLOCK_M) * p.B * p.H * splits,
        q.strides[:3], k.strides[:3], v.strides[:3], k_new and k_new.strides[:3], v_new and v_new.strides[:3],
        table.strides[0] if table else 0, p.scale, p.left, p.softcap, p.B, p.T, p.S, p.L, p.H, k.shape[0], splits,
        G=p.G, D=p.D, DV=p.DV, PAGE_SIZE=k.shape[1] if table else 0,
        BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV), BLOCK_T=tuning.APPEND_BLOCK_T,
        ALIGNED=depth.aligned, **tile._asdict(), **depth_tile._asdict(),
    )  # fmt: skip


def launch_decode_split(
    p: Problem, q: Tensor, k_cache: Tensor, v_cache: Tensor, k_depth: list[Tensor], v_depth: list[Tensor],
    k_new: Tensor | None, v_new: Tensor | None, cache_seqlens: Tensor, block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Parts' outs (splits, B, T, HQ, DV) and lses (splits, B, HQ, T) in float32, contiguous; outs in q's
    dtype if there is one split.

    p.S is what a sequence's part of the caches can hold. They hold cache_seqlens keys of it, to which k_new and
    v_new are written after them.
    """
    tile = tuning.decode_tile(q.device, q.dtype, p.B * p.H, p.T * p.G, p.D, p.DV)
    programs = triton.cdiv(p.T * p.G, tile.BLOCK_M) * p.B * p.H
    key_bytes = (tuning.block_dim(p.D) + tuning.block_dim(p.DV)) * q.itemsize
    splits = tuning.decode_splits(q.device, tile, key_bytes, programs, p.S)
    outs = q.new_empty(splits, p.B, p.T, p.H * p.G, p.DV, dtype=q.dtype if splits == 1 else torch.float32)
    lses = q.new_empty(splits, p.B, p.H * p.G, p.T, dtype=torch.float32)
    depth, depth_layout = depth_pointers(k_depth, v_depth) if p.L else ([None, None], DepthLayout())
    layouts = map(layout, (q, k_cache, v_cache, k_new, v_new, cache_seqlens, block_table))
    launch = _prepare(p, tile, splits, *layouts, depth_layout)
    launch(q, k_cache, v_cache, *depth, k_new, v_new, cache_seqlens, block_table, outs, lses)
    return outs, lses
