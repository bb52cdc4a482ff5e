"""Depth slots where they lie: a device table that leads kernels to a list of tensors.

A list of L slots is L unrelated tensors, possibly with different strides. The table holds one word
per slot, (index of its strides) << 50 | address, and the distinct (stride_b, stride_t, stride_h), in
elements. It is written by a tiny kernel that receives the words as its arguments: unlike a
host-to-device copy that needs no pinned memory to outlive the call and no synchronization, so that
it can be captured in a CUDA graph.
"""

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.launch import Launch, layout


@triton.jit
def _moda_slot_table_kernel(table_ptr, words):
    for i in tl.static_range(len(words)):
        tl.store(table_ptr + i, words[i])


@lru_cache
def _write_words(device: torch.device) -> Launch:
    """``_moda_slot_table_kernel``, compiled for any words: Triton makes a constant of a 1, and takes 32 bits
    for a number that fits, so that it must see large ones first.
    """
    most, num_warps = tuning.SLOT_TABLE
    launch = Launch(_moda_slot_table_kernel, 1, num_warps=num_warps)
    launch(torch.empty(most, dtype=torch.int64, device=device), (2**62 + 1,) * most)
    return launch


@lru_cache
def _triton_dtype(dtype: torch.dtype) -> tl.constexpr:
    """A constant of the compiled code, wherever it stands among the arguments: kernels receive nothing for it."""
    return tl.constexpr(getattr(tl, str(dtype).removeprefix("torch.")))


def is_packed(depth: list[Tensor]) -> bool:
    """A list of one packed tensor (B, T, L, H, D), and not of slots."""
    return bool(depth) and depth[0].dim() == 5


class DepthLayout(NamedTuple):
    """What launches that read depth slots are prepared for."""

    aligned: bool = False  # ALIGNED of ``slot_rows``
    packed: bool = True
    tensors: tuple[Hashable, ...] = ()


def depth_pointers(*depths: list[Tensor]) -> tuple[list[Any], DepthLayout]:
    """For each depth (L slots, or a list of one packed tensor) what ``slot_rows`` takes; and their layout.

    All depths have the same number L >= 1 of slots, on one device, and each has one dtype.
    """
    first = depths[0][0]
    if is_packed(depths[0]):
        packed = [depth[0] for depth in depths]
        pointers: list[Any] = [(x, x.stride()[:4]) for x in packed]
        return pointers, DepthLayout(tensors=tuple(map(layout, packed)))
    layouts: dict[tuple[int, ...], int] = {}
    words, misaligned = [], 0
    for depth in depths:
        for slot in depth:
            address = slot.data_ptr()
            misaligned |= address
            words.append(layouts.setdefault(slot.stride(), len(layouts)) << 50 | address)
        words += [0] * (len(words) % 2)  # each part begins on 16 bytes
    part = len(words) // len(depths)
    for stride_b, stride_t, stride_h, _ in layouts:
        words += stride_b, stride_t, stride_h
        misaligned |= (stride_b | stride_t | stride_h) * first.element_size()
    most = tuning.SLOT_TABLE.words
    words += [0] * (-len(words) % most)
    table = torch.empty(len(words), dtype=torch.int64, device=first.device)
    write = _write_words(first.device)
    for start in range(0, len(words), most):
        write(table[start:], tuple(words[start : start + most]))
    strides = table[part * len(depths) :]
    dtypes = tuple(depth[0].dtype for depth in depths)
    pointers = [(table[part * i :], (strides, _triton_dtype(dtype))) for i, dtype in enumerate(dtypes)]
    return pointers, DepthLayout(misaligned % 16 == 0, False, dtypes)


@triton.jit
def slot_rows(depth, b, j, offs_t, offs_l, l_ok, ALIGNED: tl.constexpr):
    """Pointers [.., BLOCK_L] to rows (b, t, j) of depth slots ``offs_l``; ``offs_t`` is [.., 1], or
    [BLOCK_L] for one token to each slot.

    ``depth`` is (words, (strides, dtype)), as above, or, for a packed tensor, (pointer,
    (stride_b, stride_t, stride_l, stride_h)): both know the slots' dtype, which need not be q's. ALIGNED:
    every row of every slot starts on 16 bytes, which lets loads be vectorized although addresses come from
    memory.
    """
    t = offs_t.to(tl.int64)
    PAIRS: tl.constexpr = len(offs_t.shape) == 1
    if len(depth[1]) == 2:
        word = tl.load(depth[0] + offs_l, mask=l_ok, other=0)
        strides = depth[1][0] + (word >> 50) * 3
        start = b * tl.load(strides) + j * tl.load(strides + 2)
        rows = (word & ((1 << 50) - 1)).to(tl.pointer_type(depth[1][1])) + start
        if PAIRS:
            rows = rows + t * tl.load(strides + 1)
            return tl.multiple_of(rows, [16]) if ALIGNED else rows
        else:
            rows = rows[None, :] + t * tl.load(strides + 1)[None, :]
            return tl.multiple_of(rows, [16, 16]) if ALIGNED else rows
    else:
        stride_b, stride_t, stride_l, stride_h = depth[1]
        rows = depth[0] + b * stride_b + j * stride_h
        if PAIRS:
            return rows + t * stride_t + offs_l.to(tl.int64) * stride_l
        else:
            return rows + t * stride_t + offs_l.to(tl.int64)[None, :] * stride_l


@triton.jit
def skip_slots(depth, first):
    """depth[0], as ``slot_rows`` takes it, past the first slots."""
    if len(depth[1]) == 2:
        return depth[0] + first
    else:
        return depth[0] + first.to(tl.int64) * depth[1][2]
