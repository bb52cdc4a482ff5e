"""The operators: choose each pass's plan, and run its kernels in order.

Depth alone is a problem of S = 0: the depth passes then do all there is to do.
"""

from typing import Any

import torch
from torch import Tensor

from moda_kernels import sdpa, tuning
from moda_kernels.backward_chunk_dkv import launch_chunk_dkv
from moda_kernels.backward_chunk_dq import launch_chunk_dq
from moda_kernels.backward_delta import launch_delta
from moda_kernels.backward_depth import launch_backward_depth
from moda_kernels.backward_dkv import launch_dkv
from moda_kernels.backward_dq import launch_dq
from moda_kernels.bands import Bands, launch_bands
from moda_kernels.decode_merge import launch_decode_merge
from moda_kernels.decode_split import FARTHEST, launch_decode_split
from moda_kernels.depth_mass import launch_depth_mass
from moda_kernels.forward import launch_forward
from moda_kernels.forward_depth import launch_forward_depth
from moda_kernels.launch import Problem, lse_dtype
from moda_kernels.plans import backward_plan, forward_plan
from moda_kernels.slots import is_packed

KeyGradients = tuple[Any, Any, Any, Any]
"""For k, v, k_depth and v_depth, each in its form."""


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    S: int | None = None,
) -> Problem:
    """S is k's length, if not given."""
    B, T, HQ, D = q.shape
    S, H = k.shape[1] if S is None else S, k.shape[2]
    L = k_depth[0].shape[2] if is_packed(k_depth) else len(k_depth)
    if max(T * HQ // H, 2 * (T + S)) >= 2**31:  # kernels number rows and keys in 32 bits
        raise ValueError(f"q and k must be shorter: a GPU takes T * G < 2**31 and T + S < 2**30, got T = {T} and S = {S}")
    # Windows that show the same keys, small enough for 32-bit sums with positions.
    left, right = (side if side is None else min(side, T + S) for side in (left, right))
    return Problem(B, T, S, L, H, HQ // H, D, v.shape[3], scale, left, right, softcap)


def _packed(p: Problem, cu_seqlens: tuple[Tensor, Tensor] | None) -> tuple[Problem, Bands]:
    """Of packed documents their bands, and the problem without the sides that these stand in for."""
    if cu_seqlens is None:
        return p, None
    bands = launch_bands(*cu_seqlens, p.T, p.S, p.left, p.right)
    return p._replace(left=None, right=None, varlen=True), bands


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    plan: str = "auto",
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, T, HQ, DV) in q's dtype and lse (B, HQ, T) in ``lse_dtype``, both contiguous."""
    p = problem(q, k, v, k_depth, scale, left, right, softcap)
    if q.numel() == 0:
        return q.new_empty(*q.shape[:3], p.DV), q.new_empty(p.B, p.H * p.G, p.T, dtype=lse_dtype(q.dtype))
    with torch.cuda.device_of(q):
        p, bands = _packed(p, cu_seqlens)
        two_kernels = p.L > 0 and tuning.forward_two_kernels(q.device, q.dtype, p.G, p.D, p.DV, is_packed(k_depth))
        name = forward_plan(plan, p, q, k, v, two_kernels).library
        if name is not None:
            out, lse = sdpa.attention(name, q, k, v, p.causal, p.scale)
            if p.L == 0:
                return out.contiguous(), lse.contiguous().to(lse_dtype(q.dtype))
        elif p.L and p.S == 0:
            out, lse = None, None
        elif two_kernels:
            out, lse = launch_forward(p._replace(L=0), q, k, v, [], [], bands)
        else:
            return launch_forward(p, q, k, v, k_depth, v_depth, bands)
        return launch_forward_depth(p, q, k_depth, v_depth, out, lse)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    plan: str = "auto",
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    grads: KeyGradients | None = None,
    running: KeyGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradients of q, k, v, k_depth and v_depth, in the forms of these.

    Those of keys and values go into ``grads`` where that is given, and else into new contiguous tensors.
    ``running`` is what later readers have left for them and is added; None stands for nothing.
    """
    p = problem(q, k, v, k_depth, scale, left, right, softcap)
    into: KeyGradients = grads or (
        None,
        None,
        [x.new_empty(x.shape) for x in k_depth],
        [x.new_empty(x.shape) for x in v_depth],
    )
    dk, dv, dk_depth, dv_depth = into
    k_running, v_running, *depth_running = running or (None, None)
    depths = k_depth, v_depth, dk_depth, dv_depth, *depth_running
    if dout.stride(-1) != 1:  # autograd hands down expanded gradients
        dout = dout.contiguous()
    with torch.cuda.device_of(q):
        p, bands = _packed(p, cu_seqlens)
        name = backward_plan(plan, p, q, k, v, dlse).library if q.numel() else None
        if name is not None:
            dq, *shares = sdpa.attention_backward(
                name, dout, q, k, v, out, lse, p.causal, p.scale
            )
            if p.L:
                dq, _ = launch_backward_depth(p, q, dout, out, lse, None, *depths, dq_sequence=dq)
            dk, dv = map(_sum, shares, (k_running, v_running), (dk, dv))
            return dq.contiguous(), dk, dv, dk_depth, dv_depth
        if grads is None:
            dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        if q.numel() == 0:
            return q.new_empty(q.shape), dk.zero_(), dv.zero_(), dk_depth, dv_depth
        if p.L:
            dq_depth, delta = launch_backward_depth(p, q, dout, out, lse, dlse, *depths)
            if p.S == 0:
                return dq_depth, dk, dv, dk_depth, dv_depth
        else:
            dq_depth, delta = None, launch_delta(p, dout, out, dlse)
        dq = launch_dq(p, q, k, v, dout, lse, delta, dq_depth, bands)
        launch_dkv(p, q, k, v, dout, lse, delta, dk, dv, k_running, v_running, bands)
    return dq, dk, dv, dk_depth, dv_depth


def _sum(grad: Tensor, running: Tensor | None, into: Tensor | None) -> Tensor:
    """``grad`` plus what is running: in ``into``, or contiguous."""
    if into is None:
        return grad.contiguous()
    return into.copy_(grad) if running is None else torch.add(grad, running, out=into)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    chunk_size: int,
    scale: float,
    left: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """As ``attention``, causal, over the depth of a token's chunk."""
    p = problem(q, k, v, k_depth, scale, left, 0, softcap)
    if p.T * p.L >= 2**31:  # the kernels number a chunk's (token, slot) pairs in 32 bits
        raise ValueError(f"k_depth must have fewer than 2**31 pairs of token and slot, got T = {p.T} and L = {p.L}")
    if q.numel() == 0 or p.L == 0 or chunk_size == 1:
        return attention(q, k, v, k_depth, v_depth, scale, left, 0, softcap, "fused")
    with torch.cuda.device_of(q):
        p = p._replace(chunk=min(chunk_size, p.T))
        return launch_forward(p, q, k, v, k_depth, v_depth)


def chunk_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    chunk_size: int,
    scale: float,
    left: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradients of q, k, v, k_depth and v_depth, in the forms of these."""
    p = problem(q, k, v, k_depth, scale, left, 0, softcap)
    if q.numel() == 0 or p.L == 0 or chunk_size == 1:
        return attention_backward(
            dout, dlse, q, k, v, k_depth, v_depth, out, lse, scale, left, 0, softcap, "fused"
        )
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dk_depth, dv_depth = ([x.new_empty(x.shape) for x in depth] for depth in (k_depth, v_depth))
    if dout.stride(-1) != 1:  # autograd hands down expanded gradients
        dout = dout.contiguous()
    with torch.cuda.device_of(q):
        p = p._replace(chunk=min(chunk_size, p.T))
        delta = launch_delta(p, dout, out, dlse)
        launch_chunk_dkv(p, q, dout, lse, delta, k_depth, v_depth, dk_depth, dv_depth)
        dq = launch_chunk_dq(p, q, dout, lse, delta, k_depth, v_depth)
        dq = launch_dq(p, q, k, v, dout, lse, delta, dq)
        launch_dkv(p, q, k, v, dout, lse, delta, dk, dv, None, None)
    return dq, dk, dv, dk_depth, dv_depth


def depth_mass(
    q: Tensor, k_depth: list[Tensor], lse: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """(B, HQ, L) in float32."""
    B, T, HQ, D = q.shape
    L = k_depth[0].shape[2] if is_packed(k_depth) else len(k_depth)
    if L == 0 or q.numel() == 0:
        return q.new_zeros(B, HQ, L, dtype=torch.float32)
    H = k_depth[0].shape[-2]
    p = Problem(B, T, 0, L, H, HQ // H, D, D, scale, None, None, softcap)
    with torch.cuda.device_of(q):
        return launch_depth_mass(p, q, k_depth, lse)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_new: Tensor | None,
    v_new: Tensor | None,
    scale: float,
    left: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out (B, T, HQ, DV) in q's dtype and lse (B, HQ, T) in float32; k_new and v_new go into the caches."""
    S = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    p = problem(q, k_cache, v_cache, k_depth, scale, left, 0, softcap, S)
    # A length may lie beyond the cache, and a window reach back into it.
    p = p._replace(left=None if left is None else min(left, FARTHEST.value + p.T))
    if q.numel() == 0:
        return q.new_empty(*q.shape[:3], p.DV), q.new_empty(p.B, p.H * p.G, p.T, dtype=torch.float32)
    with torch.cuda.device_of(q):
        outs, lses = launch_decode_split(
            p, q, k_cache, v_cache, k_depth, v_depth, k_new, v_new, cache_seqlens, block_table
        )
        if len(outs) == 1:
            return outs[0], lses[0]
        return launch_decode_merge(p, outs, lses, q.dtype)
