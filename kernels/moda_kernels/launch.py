"""The two operators as launches: allocate results, look block sizes up, run the passes in order."""

from typing import Any

import torch
import triton
from torch import Tensor

from moda_kernels import tuning
from moda_kernels.backward_delta import _moda_delta_kernel
from moda_kernels.backward_depth import _moda_backward_depth_kernel
from moda_kernels.backward_dkv import _moda_backward_dkv_kernel
from moda_kernels.backward_dq import _moda_backward_dq_kernel
from moda_kernels.forward import _moda_forward_kernel
from moda_kernels.slots import depth_arguments

KeyGradients = tuple[Any, Any, Any, Any]
"""For k, v, k_depth and v_depth, each in its form."""


def _slot_count(depth: list[Tensor]) -> int:
    return depth[0].shape[2] if depth and depth[0].dim() == 5 else len(depth)


def _reach(side: int | None, T: int, S: int) -> int | None:
    """The same window for T queries and S keys, small enough for 32-bit sums with positions."""
    return None if side is None else min(side, T + S)


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
    B, T, HQ, D = q.shape
    S, H, DV = k.shape[1], k.shape[2], v.shape[3]
    G, L = HQ // H, _slot_count(k_depth)
    left, right = _reach(left, T, S), _reach(right, T, S)
    out = q.new_empty(B, T, HQ, DV)
    lse = q.new_empty(B, HQ, T, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    tile = tuning.forward_tile(q.dtype, G, D, DV)
    depth_tile = tuning.forward_depth(q, DV, G, tile.BLOCK_M)
    with torch.cuda.device_of(q):
        depth, aligned = depth_arguments(k_depth, v_depth) if L else ([None, None], False)
        _moda_forward_kernel[(triton.cdiv(T * G, tile.BLOCK_M) * B * H,)](
            q, k, v, *depth, out, lse, q.stride()[:3], k.stride()[:3], v.stride()[:3],
            scale, left, right, softcap, B, T, S, L, H, G=G, D=D, DV=DV,
            BLOCK_D=tuning.block_dim(D), BLOCK_DV=tuning.block_dim(DV), ALIGNED=aligned,
            **tile._asdict(), **depth_tile._asdict(),
        )  # fmt: skip
    return out, lse


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
    B, T, HQ, D = q.shape
    S, H, DV = k.shape[1], k.shape[2], v.shape[3]
    G, L = HQ // H, _slot_count(k_depth)
    left, right = _reach(left, T, S), _reach(right, T, S)
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
    dims = dict(D=D, DV=DV, BLOCK_D=tuning.block_dim(D), BLOCK_DV=tuning.block_dim(DV))
    delta = torch.empty_like(lse)
    dq_depth = torch.empty(q.shape, dtype=torch.float32, device=q.device) if L else None
    q_strides, k_strides, v_strides, dout_strides = (x.stride()[:3] for x in (q, k, v, dout))
    with torch.cuda.device_of(q):
        _moda_delta_kernel[(triton.cdiv(T, 64) * B * HQ,)](
            dout, out, dlse, delta, dout_strides, out.stride()[:3], None if dlse is None else dlse.stride(), B, T, HQ,
            DV=DV, BLOCK_M=64, BLOCK_DV=tuning.block_dim(DV),
        )  # fmt: skip
        if L:
            depth, aligned = depth_arguments(k_depth, v_depth, dk_depth, dv_depth, *depth_running)
            depth += [None] * (6 - len(depth))
            depth_tile = tuning.backward_depth_tile(G, D, DV)
            _moda_backward_depth_kernel[(triton.cdiv(T, depth_tile.BLOCK_T) * B * H,)](
                q, dout, lse, delta, dq_depth, *depth, q_strides, dout_strides, scale, softcap,
                B, T, L, H, G=G, ALIGNED=aligned, **dims, **depth_tile._asdict(),
            )  # fmt: skip
        tile = tuning.backward_dq_tile(q.dtype, D, DV)
        _moda_backward_dq_kernel[(triton.cdiv(T * G, tile.BLOCK_M) * B * H,)](
            q, k, v, dout, lse, delta, dq_depth, dq, q_strides, k_strides, v_strides, dout_strides,
            scale, left, right, softcap, B, T, S, H, G=G, **dims, **tile._asdict(),
        )  # fmt: skip
        tile = tuning.backward_dkv_tile(q.dtype, D, DV)
        _moda_backward_dkv_kernel[(triton.cdiv(S, tile.BLOCK_N) * B * H,)](
            q, k, v, dout, lse, delta, dk, dv, k_running, v_running, q_strides, k_strides, v_strides,
            dout_strides, dk.stride()[:3], dv.stride()[:3],
            *(None if x is None else x.stride()[:3] for x in (k_running, v_running)),
            scale, left, right, softcap, B, T, S, H, G=G, **dims, **tile._asdict(),
        )  # fmt: skip
    return dq, dk, dv, dk_depth, dv_depth
