"""Block sizes of every pass, by what limits them: head dims, element size, group, shared memory.

Measured on an H100 (docs/performance.md) for head dim 64 in bfloat16; the rest is scaled from there
by what a block keeps in registers and shared memory. The tests compile for Ada and consumer Blackwell, which
have the least shared memory; nothing was tuned on any other GPU (an H200's times: docs/performance.md).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

DECODE_SPLITS = 128  # at most: parts of a sequence's keys that a decoding step merges
APPEND_BLOCK_T = 16  # new tokens that a decoding program writes at a time


def split_forward(G: int, D: int, DV: int, causal: bool, two_kernels: bool) -> float:
    """Floating-point operations of the sequence, in forward, above which a split forward is faster. Sooner where a
    fused one hides less depth: where it is ``two_kernels``, and in groups of one or four, against two and eight.
    """
    if max(D, DV) > 64:
        return 3e10 if two_kernels else 1e11
    if G == 1:
        return 1e11 if causal else 3e10
    return 6.5e10 if two_kernels or G == 4 else 1e12


def split_backward(G: int, D: int, DV: int, causal: bool) -> float:
    """The same, again in forward, for a split backward."""
    if max(D, DV) > 64:
        return 5e10 if G == 1 else 1.5e10
    return 1e11 if causal else 3e10


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
    """BLOCK_G query heads of a token against BLOCK_L slots."""

    BLOCK_G: int
    BLOCK_L: int
    STAGES: int
    num_warps: int


class DepthTile(NamedTuple):
    """BLOCK_T tokens of BLOCK_G query heads each against BLOCK_L slots."""

    BLOCK_T: int
    BLOCK_G: int
    BLOCK_L: int
    num_warps: int
    num_stages: int


class DepthMassTile(NamedTuple):
    """RUN tokens, by BLOCK_T of them and BLOCK_G query heads against BLOCK_L slots."""

    RUN: int
    BLOCK_T: int
    BLOCK_G: int
    BLOCK_L: int
    num_warps: int
    num_stages: int


class DeltaTile(NamedTuple):
    """BLOCK_T tokens of one query head."""

    BLOCK_T: int
    num_warps: int


class BandsTile(NamedTuple):
    """BLOCK tokens, and as many keys."""

    BLOCK: int
    num_warps: int


class DecodeMergeTile(NamedTuple):
    """BLOCK_S parts of a row at a time."""

    BLOCK_S: int
    num_warps: int


class SlotTable(NamedTuple):
    """How many words of a table of slots one program writes: it takes them as arguments, at most 4 KB."""

    words: int
    num_warps: int


BACKWARD_DELTA = DeltaTile(BLOCK_T=64, num_warps=4)
BANDS = BandsTile(BLOCK=128, num_warps=4)
SLOT_TABLE = SlotTable(words=128, num_warps=1)


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


def forward_tile(device: torch.device, dtype: torch.dtype, G: int, D: int, DV: int, packed: bool) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(32, 32, 4, 1) if width <= 128 else Tile(16, 32, 8, 1)
    if width <= 64:
        # 168 registers let three programs share a multiprocessor, 128 four: what a group needs whose
        # programs have few tokens, and so little depth in flight. Elsewhere both would spill.
        unlimited = G == 64 or (G == 4 and packed)
        return Tile(64, 64, 4, 3, maxnreg=None if unlimited else 128 if G in (8, 16, 32) else 168)
    if width <= 128:
        return Tile(64, 64, 4, 3 if shared_memory(device) >= 163_840 else 2)
    return Tile(64, 32, 4, 2)


def forward_depth(
    device: torch.device, dtype: torch.dtype, G: int, D: int, DV: int, BLOCK_M: int, packed: bool
) -> ForwardDepth:
    """Dots where the group fills them and a block of slots for all tokens fits; else sums.

    Loads that follow a table of slots gain less from a deeper pipeline than they lose by its memory.
    """
    width = block_dim(D) + block_dim(DV)
    least = 4 if packed and width <= 128 else 8
    if dtype is not torch.float32 and G >= least and BLOCK_M % G == 0:
        slots = BLOCK_M // G * 16 * width * dtype.itemsize
        for stages in (2, 1) if packed and G <= 8 else (1,):
            if (stages + 1) * slots <= shared_memory(device):
                return ForwardDepth(True, 16, stages)
    if width <= 128:
        return ForwardDepth(False, 2, 3)
    if width <= 256 and packed and dtype is not torch.float32:
        return ForwardDepth(False, 1, 3)
    return ForwardDepth(False, 2 if width <= 256 else 1, 2)


def forward_mixed(device: torch.device, programs: int, D: int, DV: int, packed: bool) -> bool:
    """Whether programs with many causal keys and with few start by turns, so that some stream depth while others
    multiply. Where there are more of them that was slower.
    """
    return packed and max(block_dim(D), block_dim(DV)) <= 64 and programs <= 16 * multiprocessors(device)


@lru_cache
def forward_two_kernels(device: torch.device, dtype: torch.dtype, G: int, D: int, DV: int, packed: bool) -> bool:
    """Whether a fused forward is two kernels. The second, for depth, has dots for any group; for three heads and more
    sums in the first would cost more than a pass over out.
    """
    BLOCK_M = forward_tile(device, dtype, G, D, DV, packed).BLOCK_M
    return G >= 3 and not forward_depth(device, dtype, G, D, DV, BLOCK_M, packed).DEPTH_DOT


def forward_depth_tile(dtype: torch.dtype, G: int, D: int, DV: int) -> ForwardDepthTile:
    """As small as programs get, a token by a warp, and many of them: what hides the latency of loads.

    Wide groups go by in parts: what a batched dot over one token does, every warp would do again.
    """
    width = max(block_dim(D), block_dim(DV))
    BLOCK_G = min(triton.next_power_of_2(G), 4096 // width)
    if dtype is torch.float32:  # plain multiply-adds, which warps do share
        return ForwardDepthTile(BLOCK_G, 16, 1, 4)
    return ForwardDepthTile(BLOCK_G, 16, 2, 1)


@lru_cache
def backward_depth_tile(dtype: torch.dtype, G: int, D: int, DV: int) -> DepthTile:
    """A token by a warp; by four where one has not the registers for it.

    A dot contracts over at least 16 heads: smaller groups are padded, and larger ones go by in parts where q,
    dout and dq of all heads would not fit in registers.
    """
    width = max(block_dim(D), block_dim(DV))
    BLOCK_G = max(16, min(triton.next_power_of_2(G), 4096 // width))
    if dtype is torch.float32 or width > 128:
        return DepthTile(1, BLOCK_G, 16, 4, 1)
    return DepthTile(1, BLOCK_G, 16, 1, 2)


@lru_cache
def depth_mass_tile(dtype: torch.dtype, G: int, D: int) -> DepthMassTile:
    """A token by a warp, as in the forward over depth; wide groups go by in parts."""
    width = block_dim(D)
    if dtype is torch.float32:
        return DepthMassTile(32, 1, 16, 16, 4, 1)
    return DepthMassTile(32, 1, min(triton.next_power_of_2(G), 4096 // width), 16, 1, 2)


def backward_dq_tile(device: torch.device, dtype: torch.dtype, D: int, DV: int) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(32, 32, 4, 1) if width <= 128 else Tile(16, 16, 4, 1)
    if width <= 64:
        return Tile(64, 64, 4, 3)
    if width <= 128:
        return Tile(128, 64, 8, 3) if shared_memory(device) >= 163_840 else Tile(64, 64, 4, 2)
    return Tile(64, 32, 4, 1)


def backward_dkv_parts(device: torch.device, programs: int, rows: int) -> int:
    """How many programs share the rows for the same keys: two for each multiprocessor are enough, and 512 rows
    worth one.
    """
    parts = 1
    while programs * parts < 2 * multiprocessors(device) and rows >= 1024 * parts:
        parts *= 2
    return parts


@lru_cache
def backward_dkv_tile(device: torch.device, dtype: torch.dtype, D: int, DV: int) -> Tile:
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(16, 32 if width <= 128 else 16, 4, 1)
    if width <= 64:
        return Tile(128, 64, 4, 2)
    if width <= 128:
        return Tile(64, 64, 4, 2)
    return Tile(32, 64, 8, 1) if shared_memory(device) >= 114_688 else Tile(32, 32, 4, 1)


@lru_cache
def decode_tile(device: torch.device, dtype: torch.dtype, heads: int, rows: int, D: int, DV: int) -> Tile:
    """For the ``rows`` (token, group) pairs of each of so many heads, of all sequences: as many as do not
    spill, and no more than there are. Where keys are split, one program fills a multiprocessor with loads.
    """
    width = max(block_dim(D), block_dim(DV))
    if dtype is torch.float32:
        return Tile(16, 32, 4, 2 if width <= 64 else 1)
    BLOCK_M = max(16, min(64 if width <= 128 else 32, triton.next_power_of_2(rows)))
    if width > 128:
        return Tile(BLOCK_M, 32, 4, 2)
    few = heads < multiprocessors(device) and BLOCK_M * width <= 1024
    return Tile(BLOCK_M, 128 if few else 64, 4, 3 if shared_memory(device) >= 163_840 else 2)


def decode_depth(
    device: torch.device, dtype: torch.dtype, G: int, D: int, DV: int, BLOCK_M: int
) -> ForwardDepth:
    """The forward's walk over slots; sums take more slots at a time where there are fewer rows."""
    depth = forward_depth(device, dtype, G, D, DV, BLOCK_M, packed=False)
    slots = max(1, 8192 // (BLOCK_M * max(block_dim(D), block_dim(DV))))
    return depth if depth.DEPTH_DOT else depth._replace(BLOCK_L=min(8, slots))


@lru_cache
def decode_splits(device: torch.device, tile: Tile, key_bytes: int, programs: int, S: int) -> int:
    """Programs that share a tile's keys, of ``key_bytes`` with their values: what fills the multiprocessors
    with loads, 64 KB each, and two blocks of keys for each.

    ``S`` is what a cache can hold: how much it holds is known on the device alone.
    """
    in_flight = tile.num_stages * tile.BLOCK_N * key_bytes
    wanted = (1 if in_flight > 65_536 else 2) * multiprocessors(device) // programs
    return max(1, min(wanted, triton.cdiv(S, 2 * tile.BLOCK_N), DECODE_SPLITS))


def decode_merge_tile(DV: int) -> DecodeMergeTile:
    return DecodeMergeTile(4096 // block_dim(DV), 2)
