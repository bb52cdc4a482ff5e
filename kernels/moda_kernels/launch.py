"""The two operators as launches: allocate results, look the launches up, run the passes in order.

What does not depend on addresses (grids, block sizes, strides) is worked out once for all calls of one
layout, and so is Triton's search for the compiled code.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.backward_delta import _moda_delta_kernel
from moda_kernels.backward_depth import _moda_backward_depth_kernel
from moda_kernels.backward_dkv import _moda_backward_dkv_kernel
from moda_kernels.backward_dq import _moda_backward_dq_kernel
from moda_kernels.forward import _moda_forward_kernel
from moda_kernels.launcher import Launch, Layout, layout
from moda_kernels.slots import DepthLayout, depth_pointers

KeyGradients = tuple[Any, Any, Any, Any]
"""For k, v, k_depth and v_depth, each in its form."""

_LAYOUTS = 4096  # a model of 48 layers has 48, or 96, for each length and batch


class Problem(NamedTuple):
    """Sizes and options of a call: q (B, T, G H, D), k (B, S, H, D), v (B, S, H, DV), L slots."""

    B: int
    T: int
    S: int
    L: int
    H: int
    G: int
    D: int
    DV: int
    scale: float
    left: int | None
    right: int | None
    softcap: float | None


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
) -> Problem:
    B, T, HQ, D = q.shape
    S, H = k.shape[1], k.shape[2]
    L = k_depth[0].shape[2] if k_depth and k_depth[0].dim() == 5 else len(k_depth)
    # Windows that show the same keys, small enough for 32-bit sums with positions.
    left, right = (side if side is None else min(side, T + S) for side in (left, right))
    return Problem(B, T, S, L, H, HQ // H, D, v.shape[3], scale, left, right, softcap)


@lru_cache(_LAYOUTS)
def _forward(p: Problem, q: Layout, k: Layout, v: Layout, depth: DepthLayout) -> Launch:
    tile = tuning.forward_tile(q.dtype, p.G, p.D, p.DV)
    depth_tile = tuning.forward_depth(q.device, q.dtype, p.G, p.D, p.DV, tile.BLOCK_M)
    return Launch(
        _moda_forward_kernel, triton.cdiv(p.T * p.G, tile.BLOCK_M) * p.B * p.H,
        q.strides[:3], k.strides[:3], v.strides[:3], p.scale, p.left, p.right, p.softcap, p.B, p.T, p.S, p.L, p.H,
        G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=tuning.block_dim(p.DV),
        ALIGNED=depth.aligned, **tile._asdict(), **depth_tile._asdict(),
    )  # fmt: skip


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
) -> tuple[Tensor, Tensor]:
    """out (B, T, HQ, DV) in q's dtype and lse (B, HQ, T) in float32, both contiguous."""
    p = _problem(q, k, v, k_depth, scale, left, right, softcap)
    out = q.new_empty(p.B, p.T, p.H * p.G, p.DV)
    lse = q.new_empty(p.B, p.H * p.G, p.T, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    with torch.cuda.device_of(q):
        depth, depth_layout = depth_pointers(k_depth, v_depth) if p.L else ([None, None], DepthLayout())
        launch = _forward(p, *map(layout, (q, k, v)), depth_layout)
        launch(q, k, v, *depth, out, lse)
    return out, lse


def _strides(x: Layout | None) -> tuple[int, ...] | None:
    return None if x is None else x.strides[:3]


class Backward(NamedTuple):
    """The passes of backward, in their order."""

    delta: Launch
    depth: Launch | None
    dq: Launch
    dkv: Launch


@lru_cache(_LAYOUTS)
def _backward(
    p: Problem,
    depth: DepthLayout,
    q: Layout,
    k: Layout,
    v: Layout,
    out: Layout,
    lse: Layout,
    dout: Layout,
    dlse: Layout | None,
    dk: Layout,
    dv: Layout,
    k_running: Layout | None,
    v_running: Layout | None,
) -> Backward:
    block_dv = tuning.block_dim(p.DV)
    dims = dict(G=p.G, D=p.D, DV=p.DV, BLOCK_D=tuning.block_dim(p.D), BLOCK_DV=block_dv)
    masks = p.left, p.right, p.softcap
    depth_tile = tuning.backward_depth_tile(p.G, p.D, p.DV)
    dq_tile = tuning.backward_dq_tile(q.dtype, p.D, p.DV)
    dkv_tile = tuning.backward_dkv_tile(q.dtype, p.D, p.DV)
    return Backward(
        Launch(
            _moda_delta_kernel, triton.cdiv(p.T, 64) * p.B * p.H * p.G,
            _strides(dout), _strides(out), *(_strides(dlse) or (None,) * 3), p.B, p.T, p.H * p.G,
            DV=p.DV, BLOCK_M=64, BLOCK_DV=block_dv,
        ),
        Launch(
            _moda_backward_depth_kernel, triton.cdiv(p.T, depth_tile.BLOCK_T) * p.B * p.H,
            _strides(q), _strides(dout), p.scale, p.softcap, p.B, p.T, p.L, p.H,
            ALIGNED=depth.aligned, **dims, **depth_tile._asdict(),
        ) if p.L else None,
        Launch(
            _moda_backward_dq_kernel, triton.cdiv(p.T * p.G, dq_tile.BLOCK_M) * p.B * p.H,
            _strides(q), _strides(k), _strides(v), _strides(dout), p.scale, *masks, p.B, p.T, p.S, p.H,
            **dims, **dq_tile._asdict(),
        ),
        Launch(
            _moda_backward_dkv_kernel, triton.cdiv(p.S, dkv_tile.BLOCK_N) * p.B * p.H,
            *map(_strides, (q, k, v, dout, dk, dv, k_running, v_running)), p.scale, *masks, p.B, p.T, p.S, p.H,
            **dims, **dkv_tile._asdict(),
        ),
    )  # fmt: skip


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
    grads: KeyGradients | None = None,
    running: KeyGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradients of q, k, v, k_depth and v_depth, in the forms of these.

    Those of keys and values go into ``grads`` where that is given, and else into new contiguous tensors.
    ``running`` is what later readers have left for them and is added; None stands for nothing.
    """
    p = _problem(q, k, v, k_depth, scale, left, right, softcap)
    dq = q.new_empty(q.shape)
    dk, dv, dk_depth, dv_depth = grads or (
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        [x.new_empty(x.shape) for x in k_depth],
        [x.new_empty(x.shape) for x in v_depth],
    )
    k_running, v_running, *depth_running = running or (None, None)
    if lse.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), dk_depth, dv_depth
    if dout.stride(-1) != 1:  # autograd hands down expanded gradients
        dout = dout.contiguous()
    delta = torch.empty_like(lse)
    dq_depth = torch.empty(q.shape, dtype=torch.float32, device=q.device) if p.L else None
    with torch.cuda.device_of(q):
        depths = k_depth, v_depth, dk_depth, dv_depth, *depth_running
        depth, depth_layout = depth_pointers(*depths) if p.L else ([], DepthLayout())
        tensors = q, k, v, out, lse, dout, dlse, dk, dv, k_running, v_running
        passes = _backward(p, depth_layout, *map(layout, tensors))
        passes.delta(dout, out, dlse, delta)
        if passes.depth is not None:
            passes.depth(q, dout, lse, delta, dq_depth, *depth, *[None] * (6 - len(depth)))
        passes.dq(q, k, v, dout, lse, delta, dq_depth, dq)
        passes.dkv(q, k, v, dout, lse, delta, dk, dv, k_running, v_running)
    return dq, dk, dv, dk_depth, dv_depth
