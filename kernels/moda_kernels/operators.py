"""The two operators: choose each pass's plan, and run its kernels in order."""

from typing import Any

import torch
from torch import Tensor

from moda_kernels import library
from moda_kernels.backward_delta import launch_delta
from moda_kernels.backward_depth import launch_backward_depth
from moda_kernels.backward_dkv import launch_dkv
from moda_kernels.backward_dq import launch_dq
from moda_kernels.forward import launch_forward
from moda_kernels.forward_depth import launch_forward_depth
from moda_kernels.plans import backward_plan, forward_plan
from moda_kernels.prepared import Problem

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
) -> Problem:
    B, T, HQ, D = q.shape
    S, H = k.shape[1], k.shape[2]
    L = k_depth[0].shape[2] if k_depth and k_depth[0].dim() == 5 else len(k_depth)
    # Windows that show the same keys, small enough for 32-bit sums with positions.
    left, right = (side if side is None else min(side, T + S) for side in (left, right))
    return Problem(B, T, S, L, H, HQ // H, D, v.shape[3], scale, left, right, softcap)


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
) -> tuple[Tensor, Tensor]:
    """out (B, T, HQ, DV) in q's dtype and lse (B, HQ, T) in float32, both contiguous."""
    p = problem(q, k, v, k_depth, scale, left, right, softcap)
    if q.numel() == 0:
        return q.new_empty(*q.shape[:3], p.DV), q.new_empty(p.B, p.H * p.G, p.T, dtype=torch.float32)
    with torch.cuda.device_of(q):
        name = forward_plan(plan, p, q, k, v).library
        if name is None and p.S == 0 and p.L:
            return launch_forward_depth(p, q, k_depth, v_depth)
        if name is None:
            return launch_forward(p, q, k, v, k_depth, v_depth)
        out, lse = library.attention(name, q, k, v, p.causal, p.scale)
        if p.L == 0:
            return out.contiguous(), lse.contiguous()
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
        name = backward_plan(plan, p, q, k, v, dlse).library if q.numel() else None
        if name is not None:
            dq, *shares = library.attention_backward(
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
        dq = launch_dq(p, q, k, v, dout, lse, delta, dq_depth)
        launch_dkv(p, q, k, v, dout, lse, delta, dk, dv, k_running, v_running)
    return dq, dk, dv, dk_depth, dv_depth


def _sum(grad: Tensor, running: Tensor | None, into: Tensor | None) -> Tensor:
    """``grad`` plus what is running: in ``into``, or contiguous."""
    if into is None:
        return grad.contiguous()
    return into.copy_(grad) if running is None else torch.add(grad, running, out=into)
