"""Depth slots where they lie: a device table of addresses and strides for a list of tensors.

A list of L slots is L unrelated tensors. Kernels find them through an int64 table with one record
(address, stride_b, stride_t, stride_h) per slot, strides in elements. The table is written by a tiny
kernel that receives the records as its arguments: unlike a host-to-device copy that needs no pinned
memory to outlive the call and no synchronization, so it can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 128  # words per launch; a CUDA kernel takes at most 4 KB of arguments
_BIAS = 1 << 62


@triton.jit
def _write_words_kernel(table_ptr, start, words):
    for i in tl.static_range(len(words)):
        tl.store(table_ptr + start + i, (words[i] - (1 << 62)) >> 1)


def _encode(word: int) -> int:
    """An odd int64 far from 1 and beyond int32: Triton compiles one kernel whatever the words are."""
    return _BIAS + 2 * word + 1


def depth_arguments(*depths: list[Tensor]) -> tuple[list[tuple], bool]:
    """For each depth (L slots, or a list of one packed tensor) what ``slot_rows`` takes; and ALIGNED.

    All depths have the same number L >= 1 of slots, on one device.
    """
    if depths[0][0].dim() == 5:
        return [(packed, *packed.stride()[:4]) for (packed,) in depths], False
    slots = [slot for depth in depths for slot in depth]
    records = [(slot.data_ptr(), *slot.stride()[:3]) for slot in slots]
    size = slots[0].element_size()
    aligned = not any((address | size * (sb | st | sh)) % 16 for address, sb, st, sh in records)
    words = [_encode(word) for record in records for word in record]
    words += [_encode(0)] * (-len(words) % _WORDS)
    table = torch.empty(len(words), dtype=torch.int64, device=slots[0].device)
    for start in range(0, len(words), _WORDS):
        _write_words_kernel[(1,)](table, start, tuple(words[start : start + _WORDS]), num_warps=1)
    per_depth = 4 * len(depths[0])
    return [(table[i * per_depth :],) for i in range(len(depths))], aligned
