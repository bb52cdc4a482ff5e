"""Block sizes of every pass, by what limits them: head dims, element size, group, shared memory.

Measured on an H100 (docs/performance.md) for head dim 64 in bfloat16; the rest is scaled from there
by what a block keeps in registers and shared memory. The tests compile for Ada and consumer Blackwell, which
have the least shared memory; how fast any GPU but the H100 is has not been measured.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

# Sequence products for a depth product above which a split plan is faster: not measured yet, hence never.
SPLIT_FORWARD = math.inf
SPLIT_BACKWARD = math.inf
DECODE_SPLITS = 128  # at most: parts of a sequence's keys that a decoding step merges


class Tile(NamedTuple):
    """BLOCK_M (token, group) rows against BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


class ForwardDepth(NamedTuple):
    """How the forward walks over slots: as batched dots or as sums, BLOCK_L at a time."""

    DEPTH_DOT: bool
    BLOCK_L: int
    DEPTH_STAGES: int


class ForwardDepthTile(NamedTuple):
    """BLOCK_M (token, group) rows of the kernel that has depth alone, and its walk over slots."""

    BLOCK_M: int
    num_warps: int
    DEPTH_DOT: bool
    BLOCK_L: int
    DEPTH_STAGES: int


class DepthTile(NamedTuple):
    """BLOCK_T tokens of BLOCK_G query heads each against BLOCK_L slots."""

    BLOCK_T: int
    BLOCK_G: int
    BLOCK_L: int
    num_warps: int
    num_stages: int


def block_dim(head_dim: int) -> int:
    """Head dims are padded to a power of two of at least 16, the least that a dot contracts over."""
    return max(16, triton.next_power_of_2(head_dim))


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use."""
    if device.type != "cuda":  # the interpreter
        return 1 << 20
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter: enough to split keys of small problems
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward_tile(dtype: torch.dtype, G: int, D: int, DV: int) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(32 if width <= 128 else 16, 32, 4, 1)
    if width <= 64:
        # 168 registers let three programs share a multiprocessor, 128 four: what a group needs whose
        # programs have few tokens, and so little depth in flight. At 64 heads both would spill.
        return Tile(64, 64, 4, 3, maxnreg={16: 128, 32: 128, 64: None}.get(G, 168))
    return Tile(64, 64, 4, 2) if width <= 128 else Tile(64, 32, 4, 2)


def forward_depth(
    device: torch.device, dtype: torch.dtype, G: int, D: int, DV: int, BLOCK_M: int
) -> ForwardDepth:
    """Dots where the group fills them and a block of slots for all tokens fits; else sums."""
    width = block_dim(D) + block_dim(DV)
    if dtype is not torch.float32 and G >= 8 and BLOCK_M % G == 0:
        stages = 2 if width <= 128 and G < 16 else 1
        slots = BLOCK_M // G * 16 * width * dtype.itemsize
        if 2 * stages * slots <= shared_memory(device):
            return ForwardDepth(True, 16, stages)
    return ForwardDepth(False, 2 if width <= 256 else 1, 3 if width <= 128 else 2)


def forward_depth_tile(dtype: torch.dtype, G: int, D: int, DV: int) -> ForwardDepthTile:
    """Few tokens to a program, and many programs: what hides the latency of loads."""
    width = max(block_dim(D), block_dim(DV))
    power = triton.next_power_of_2(G) == G
    if dtype is not torch.float32 and G >= 4 and power and G * width <= 4096:
        return ForwardDepthTile(4 * G, 2, True, 16, 2)
    return ForwardDepthTile(32 if G <= 2 else 16, 2, False, 4 if width <= 64 else 2, 2)


def backward_depth_tile(G: int, D: int, DV: int) -> DepthTile:
    """A dot contracts over at least 16 heads: smaller groups are padded, and larger ones go by in
    parts where q, dout and dq of all heads would not fit in registers.
    """
    width = max(block_dim(D), block_dim(DV))
    BLOCK_G = max(16, min(triton.next_power_of_2(G), 4096 // width))
    BLOCK_T = max(1, 2048 // (width * BLOCK_G))
    return DepthTile(BLOCK_T, BLOCK_G, 16, 2 if BLOCK_T * BLOCK_G * width <= 2048 else 4, 1)


def backward_dq_tile(dtype: torch.dtype, D: int, DV: int) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(32, 32, 4, 1) if width <= 128 else Tile(16, 16, 4, 1)
    if width <= 64:
        return Tile(64, 64, 4, 3)
    return Tile(64, 64, 4, 2) if width <= 128 else Tile(64, 32, 4, 1)


def backward_dkv_tile(device: torch.device, dtype: torch.dtype, D: int, DV: int) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(16, 32 if width <= 128 else 16, 4, 1)
    if width <= 64:
        return Tile(128, 64, 4, 2)
    if width <= 128:
        return Tile(64, 64, 4, 2)
    return Tile(32, 64, 8, 1) if shared_memory(device) >= 114_688 else Tile(32, 32, 4, 1)


def decode_tile(dtype: torch.dtype, rows: int, D: int, DV: int) -> Tile:
    """For the ``rows`` (token, group) pairs of a head: as many as do not spill, and no more than
    there are. Not measured yet.
    """
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(16, 32, 4, 2 if width <= 64 else 1)
    BLOCK_M = max(16, min(64 if width <= 128 else 32, triton.next_power_of_2(rows)))
    return Tile(BLOCK_M, 64, 4, 3) if width <= 128 else Tile(BLOCK_M, 32, 4, 2)


def decode_depth(
    device: torch.device, dtype: torch.dtype, G: int, D: int, DV: int, BLOCK_M: int
) -> ForwardDepth:
    """The forward's walk over slots; sums take more slots at a time where there are fewer rows."""
    depth = forward_depth(device, dtype, G, D, DV, BLOCK_M)
    slots = max(1, 8192 // (BLOCK_M * max(block_dim(D), block_dim(DV))))
    return depth if depth.DEPTH_DOT else depth._replace(BLOCK_L=min(8, slots))


def decode_splits(device: torch.device, programs: int, S: int, BLOCK_N: int) -> int:
    """Programs that share a tile's keys: two per multiprocessor in all, and two blocks of keys each.

    ``S`` is what a cache can hold: how much it holds is known on the device alone. Not measured yet.
    """
    wanted = 2 * multiprocessors(device) // programs
    return max(1, min(wanted, triton.cdiv(S, 2 * BLOCK_N), DECODE_SPLITS))
