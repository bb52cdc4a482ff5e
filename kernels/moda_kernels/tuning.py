"""Block sizes of every pass, by what limits them: head dims, element size, group, shared memory."""

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """Launch configuration; a pass uses the blocks that it has."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def block_dim(head_dim: int) -> int:
    """Head dims are padded to a power of two of at least 16, the least that a dot contracts over."""
    return max(16, triton.next_power_of_2(head_dim))


def forward_tile(dtype: torch.dtype, D: int, DV: int) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(32 if width <= 128 else 16, 32, 4, 1)
    if width <= 64:
        return Tile(128, 64, 8, 3)
    return Tile(128, 64, 8, 2) if width <= 128 else Tile(64, 32, 4, 2)


def forward_depth(dtype: torch.dtype, D: int, DV: int, G: int, BLOCK_M: int) -> tuple[bool, int]:
    """(DEPTH_DOT, BLOCK_L): products batched over tokens where the group is wide enough to fill them."""
    width = max(block_dim(D), block_dim(DV))
    if dtype is not torch.float32 and 4 <= G <= BLOCK_M and BLOCK_M % G == 0:
        return True, 16
    return False, max(1, 256 // width)


def backward_depth_tile(D: int, DV: int) -> tuple[int, int, int]:
    """(BLOCK_T, BLOCK_L, num_warps): BLOCK_T * BLOCK_L rows of K, V, dK and dV live in registers."""
    width = max(block_dim(D), block_dim(DV))
    return max(1, 256 // width), 16, 4


def backward_dq_tile(dtype: torch.dtype, D: int, DV: int) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(32 if width <= 128 else 16, 32 if width <= 128 else 16, 4, 1)
    if width <= 64:
        return Tile(128, 64, 8, 2)
    return Tile(64, 64, 4, 2) if width <= 128 else Tile(64, 32, 4, 1)


def backward_dkv_tile(dtype: torch.dtype, D: int, DV: int) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(16, 32 if width <= 128 else 16, 4, 1)
    if width <= 64:
        return Tile(64, 128, 8, 2)
    return Tile(64, 64, 4, 2) if width <= 128 else Tile(32, 64, 8, 1)
