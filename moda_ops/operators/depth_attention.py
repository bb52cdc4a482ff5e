"""Attention over depth alone: ``moda_depth_attention`` and ``torch.ops.moda.depth_attention``.

It is ``moda::attention`` over a sequence without keys, under a name and with gradients of its own.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from moda_ops.operators.arguments import (
    DepthArgument,
    check_bool,
    check_tensors,
    score_options,
    slot_lists,
)
from moda_ops.operators.checks import check_depth_attention, sum_dtype
from moda_ops.operators.definition import DEPTH, Attention, define_attention
from moda_ops.operators.options import Options
from moda_ops.operators.other_names import knows_other_names
from moda_ops.operators.slot_tensors import SlotTensors
from moda_ops.rules.sharding import BY_TOKEN_TOO


def _no_sequence(q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor]) -> tuple[Tensor, Tensor]:
    """k (B, 0, H, D) and v (B, 0, H, DV)."""
    B, _, HQ, D = q.shape
    H = k_depth[0].shape[-2] if k_depth else HQ
    return q.new_empty(B, 0, H, D), q.new_empty(B, 0, H, v_depth[0].shape[-1] if v_depth else D)


def _forward(
    kernels: Any, q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], options: Options
) -> Any:
    k, v = _no_sequence(q, k_depth, v_depth)
    return kernels.attention(q, k, v, k_depth, v_depth, *options.resolved(q.shape[-1]))


def _backward(
    kernels: Any, dout: Tensor, dlse: Tensor | None, q: Tensor, k_depth: list[Tensor],
    v_depth: list[Tensor], out: Tensor, lse: Tensor, options: Options,
) -> Any:  # fmt: skip
    k, v = _no_sequence(q, k_depth, v_depth)
    dq, _, _, dk_depth, dv_depth = kernels.attention_backward(
        dout, dlse, q, k, v, k_depth, v_depth, out, lse, *options.resolved(q.shape[-1])
    )
    return dq, dk_depth, dv_depth


def _pairs(q: Tensor, k_depth: list[Tensor], **_: Any) -> int:
    B, T = q.shape[:2]
    return B * T * SlotTensors.of(k_depth).number


define_attention(
    Attention(
        "depth_attention",
        f"Tensor q, {DEPTH}",
        trained=3,
        check=check_depth_attention,
        forward=_forward,
        backward=_backward,
        pairs=_pairs,
        sharding=BY_TOKEN_TOO,
        options="*, Scalar? scale=None, Scalar? softcap=None",
    )
)


@overload
def moda_depth_attention(
    q: Tensor,
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def moda_depth_attention(
    q: Tensor,
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@knows_other_names
def moda_depth_attention(
    q: Tensor,
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to the depth keys of the query's own token, and to nothing else.

    For batch b, token t, query head h and its key/value head j = h // G (all of one batch b)::

        d_l = scale * q[t,h] . k_depth[l][t,j]      for every depth slot l
        lse = log( sum_l exp d_l )
        out = sum_l exp(d_l - lse) v_depth[l][t,j]

    (arXiv 2603.15619, section 2, mechanism (c); its authors call the kernel FDA.) Differentiable in
    every tensor argument, through ``out`` and through ``lse``, by which a caller can merge ``out``
    with attention over other keys. Nothing is copied: tensors are read where they lie, with any
    strides whose last is 1. Results are the same bits from run to run.

    Args:
        q: queries, (B, T, HQ, D); float16, bfloat16 or float32, on a CPU also float64.
        k_depth: depth keys, q's dtype: a list of L slots (B, T, H, D), or one packed tensor
            (B, T, L, H, D). HQ = G * H for an integer G >= 1.
        v_depth: depth values in the same form: slots (B, T, H, DV) or packed (B, T, L, H, DV).
            1 <= D, DV <= 256. ``None`` and the empty list mean L = 0 and DV = D.
        scale: factor on every score, within -1e30..1e30; default 1 / sqrt(D).
        softcap: c within 1e-7..1e30 replaces each score x by c * tanh(x / c).
        return_lse: also return ``lse``.

    Returns:
        ``out`` (B, T, HQ, DV) in q's dtype, contiguous; with ``return_lse`` the pair
        ``(out, lse)``, where ``lse`` is (B, HQ, T) in float32 (float64 for float64 inputs), natural
        logarithm. Where L = 0, out = 0, lse = -inf and the gradient of q is zero.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of an unsupported or other dtype,
            or an argument has another library's name; the text says what it is called here.
        ValueError: shapes, devices or strides that do not fit, or an option outside its range.

    Example:
        >>> import torch
        >>> from moda_ops import moda_depth_attention
        >>> B, T, HQ, H, D = 2, 16, 4, 2, 32
        >>> q = torch.randn(B, T, HQ, D, requires_grad=True)
        >>> slots = [torch.randn(B, T, H, D) for _ in range(3)]
        >>> out, lse = moda_depth_attention(q, slots, slots, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 16, 4, 32]), torch.Size([2, 4, 16]))
        >>> out.sum().backward()
        >>> q.grad.shape
        torch.Size([2, 16, 4, 32])
    """
    check_tensors(q=q)
    check_bool("return_lse", return_lse)
    options = score_options(scale, softcap)
    out, lse = torch.ops.moda.depth_attention(q, *slot_lists(k_depth, v_depth), **options)
    return (out, lse.to(sum_dtype(q))) if return_lse else out
