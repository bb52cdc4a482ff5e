"""Attention over depth alone: the public function and ``torch.ops.moda.depth_attention``.

It is ``moda::attention`` over a sequence without keys, under a name and with gradients of its own.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from moda_ops.operators import definition as ops
from moda_ops.operators.attention import (
    Depth,
    check_bool,
    check_option,
    check_tensors,
    slot_lists,
)
from moda_ops.operators.checks import (
    check_backward,
    check_depth_attention,
    depth_heads,
    lse_dtype,
    sum_dtype,
)
from moda_ops.operators.definition import LIBRARY, Options
from moda_ops.operators.other_names import knows_other_names

LIBRARY.define(
    "depth_attention(Tensor q, Tensor[] k_depth, Tensor[] v_depth, "
    "*, Scalar? scale=None, Scalar? softcap=None) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "depth_attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor[] k_depth, "
    "Tensor[] v_depth, Tensor out, Tensor lse, *, Scalar? scale=None, Scalar? softcap=None) "
    "-> (Tensor dq, Tensor[] dk_depth, Tensor[] dv_depth)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@overload
def moda_depth_attention(
    q: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def moda_depth_attention(
    q: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@knows_other_names
def moda_depth_attention(
    q: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
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
    check_option("scale", scale)
    check_option("softcap", softcap)
    check_bool("return_lse", return_lse)
    out, lse = torch.ops.moda.depth_attention(
        q,
        *slot_lists(k_depth, v_depth),
        scale=scale,
        softcap=softcap,
    )
    return (out, lse.to(sum_dtype(q))) if return_lse else out


def _no_sequence(q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor]) -> tuple[Tensor, Tensor]:
    """k (B, 0, H, D) and v (B, 0, H, DV)."""
    (B, _, _, D), (H, DV) = q.shape, depth_heads(q, k_depth, v_depth)
    return q.new_empty(B, 0, H, D), q.new_empty(B, 0, H, DV)


def _attention(
    q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    opts = Options(**options)
    check_depth_attention(q, k_depth, v_depth, opts)
    k, v = _no_sequence(q, k_depth, v_depth)
    return ops.implementation(q).attention(q, k, v, k_depth, v_depth, *opts.resolved(q.shape[-1]))


def _attention_fake(
    q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    check_depth_attention(q, k_depth, v_depth, Options(**options))
    B, T, HQ, _ = q.shape
    DV = depth_heads(q, k_depth, v_depth)[1]
    return q.new_empty(B, T, HQ, DV), q.new_empty(B, HQ, T, dtype=lse_dtype(q))


def _attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    opts = Options(**options)
    check_depth_attention(q, k_depth, v_depth, opts)
    k, v = _no_sequence(q, k_depth, v_depth)
    check_backward(dout, dlse, out, lse, q, v)
    dout = torch.zeros_like(out) if dout is None else dout
    dq, _, _, dk_depth, dv_depth = ops.implementation(q).attention_backward(
        dout, dlse, q, k, v, k_depth, v_depth, out, lse, *opts.resolved(q.shape[-1])
    )
    return dq, dk_depth, dv_depth


def _attention_backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    check_depth_attention(q, k_depth, v_depth, Options(**options))
    v = _no_sequence(q, k_depth, v_depth)[1]
    check_backward(dout, dlse, out, lse, q, v)
    return q.new_empty(q.shape), ops.empty_like(k_depth), ops.empty_like(v_depth)


ops.register(
    "depth_attention",
    _attention,
    _attention_fake,
    _attention_backward,
    _attention_backward_fake,
)
