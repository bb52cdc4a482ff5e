"""Depth slots where they lie: a device table that leads kernels to a list of tensors.

A list of L slots is L unrelated tensors, possibly with different strides. The table holds one word
per slot, (index of its strides) << 50 | address, and the distinct (stride_b, stride_t, stride_h), in
elements. It is written by a tiny kernel that receives the words as its arguments: unlike a
host-to-device copy that needs no pinned memory to outlive the call and no synchronization, so that
it can be captured in a CUDA graph.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 128  # per launch; a CUDA kernel takes at most 4 KB of arguments


@triton.jit
def _write_words_kernel(table_ptr, start, words):
    for i in tl.static_range(len(words)):
        tl.store(table_ptr + start + i, (words[i] - (1 << 62)) >> 1)


def _encode(word: int) -> int:
    """An odd int64 far from 1 and beyond int32: Triton compiles one kernel whatever the words are."""
    return (1 << 62) + 2 * word + 1


def depth_arguments(*depths: list[Tensor]) -> tuple[list[Any], bool]:
    """For each depth (L slots, or a list of one packed tensor) what ``slot_rows`` takes; and ALIGNED.

    All depths have the same number L >= 1 of slots, on one device; as slots, also one dtype.
    """
    first = depths[0][0]
    if first.dim() == 5:
        return [(packed, *packed.stride()[:4]) for (packed,) in depths], False
    layouts: dict[tuple[int, ...], int] = {}
    words, misaligned = [], 0
    for depth in depths:
        for slot in depth:
            address = slot.data_ptr()
            misaligned |= address
            words.append(layouts.setdefault(slot.stride(), len(layouts)) << 50 | address)
    for stride_b, stride_t, stride_h, _ in layouts:
        words += stride_b, stride_t, stride_h
        misaligned |= (stride_b | stride_t | stride_h) * first.element_size()
    words += [0] * (-len(words) % _WORDS)
    table = torch.empty(len(words), dtype=torch.int64, device=first.device)
    for start in range(0, len(words), _WORDS):
        chunk = tuple(map(_encode, words[start : start + _WORDS]))
        _write_words_kernel[(1,)](table, start, chunk, num_warps=1)
    L = len(depths[0])
    strides = table[L * len(depths) :]
    return [(table[i * L :], strides) for i in range(len(depths))], misaligned % 16 == 0
