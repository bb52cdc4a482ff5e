"""Packed documents: ``moda_attention_varlen`` and torch.ops.moda.attention_varlen.

The implementations see one batch entry whose documents hide each other.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from moda_ops.operators import definition as ops
from moda_ops.operators.attention import (
    Depth,
    Window,
    check_bool,
    check_int,
    check_option,
    check_plan,
    check_tensors,
    slot_lists,
    window_sides,
)
from moda_ops.operators.checks import (
    PACKED,
    Plan,
    check_attention,
    check_backward,
    check_cu_seqlens,
    lse_dtype,
    sum_dtype,
)
from moda_ops.operators.definition import LIBRARY, OPTIONS, Options, empty_like
from moda_ops.operators.other_names import knows_other_names

LIBRARY.define(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor[] k_depth, Tensor[] v_depth, "
    f"Tensor cu_seqlens_q, Tensor cu_seqlens_k, {OPTIONS}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "attention_varlen_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    "Tensor[] k_depth, Tensor[] v_depth, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor out, "
    f"Tensor lse, {OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dk_depth, Tensor[] dv_depth)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _batch_of_one(*tensors: Tensor | None) -> list[Any]:
    return [x if x is None else x.unsqueeze(0) for x in tensors]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: Options,
) -> None:
    check_attention(q, k, v, k_depth, v_depth, options, PACKED)
    check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    opts = Options(**options)
    _check(q, k, v, k_depth, v_depth, cu_seqlens_q, cu_seqlens_k, opts)
    out, lse = ops.implementation(q).attention(
        *_batch_of_one(q, k, v),
        _batch_of_one(*k_depth),
        _batch_of_one(*v_depth),
        *opts.resolved(q.shape[-1]),
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
    )
    return out.squeeze(0), lse.squeeze(0)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, k_depth, v_depth, cu_seqlens_q, cu_seqlens_k, Options(**options))
    T, HQ, _ = q.shape
    return q.new_empty(T, HQ, v.shape[-1]), q.new_empty(HQ, T, dtype=lse_dtype(q))


def _attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    opts = Options(**options)
    _check(q, k, v, k_depth, v_depth, cu_seqlens_q, cu_seqlens_k, opts)
    check_backward(dout, dlse, out, lse, q, v, PACKED)
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dk_depth, dv_depth = ops.implementation(q).attention_backward(
        *_batch_of_one(dout, dlse, q, k, v),
        _batch_of_one(*k_depth),
        _batch_of_one(*v_depth),
        *_batch_of_one(out, lse),
        *opts.resolved(q.shape[-1]),
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
    )
    dk_depth, dv_depth = ([x.squeeze(0) for x in depth] for depth in (dk_depth, dv_depth))
    return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0), dk_depth, dv_depth


def _attention_backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    _check(q, k, v, k_depth, v_depth, cu_seqlens_q, cu_seqlens_k, Options(**options))
    check_backward(dout, dlse, out, lse, q, v, PACKED)
    dq, dk, dv = empty_like([q, k, v])
    return dq, dk, dv, empty_like(k_depth), empty_like(v_depth)


ops.register(
    "attention_varlen",
    _attention,
    _attention_fake,
    _attention_backward,
    _attention_backward_fake,
)


@overload
def moda_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    plan: Plan = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def moda_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    plan: Plan = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@knows_other_names
def moda_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    plan: Plan = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`moda_attention` on documents that are packed one after the other, unpadded.

    Document d has the queries ``cu_seqlens_q[d] : cu_seqlens_q[d + 1]`` and the keys
    ``cu_seqlens_k[d] : cu_seqlens_k[d + 1]``, either of which may be none, and computes what
    :func:`moda_attention` computes on it alone: documents do not see each other. Rows after the
    last document see their depth slots alone. Nothing is copied to the host, so that a CUDA graph
    can capture the call and replay it with other lengths of the same sum.

    Args:
        q: queries, (total_q, HQ, D); dtypes and strides as in :func:`moda_attention`.
        k: sequence keys, (total_k, H, D).
        v: sequence values, (total_k, H, DV).
        k_depth: depth keys: a list of L slots (total_q, H, D), or one packed tensor
            (total_q, L, H, D); None is L = 0.
        v_depth: depth values in the same form, with DV for D.
        cu_seqlens_q: (documents + 1,), int32, on q's device: from 0, never falling, at most
            total_q. On a CPU the values are checked; on a GPU reading them would synchronise.
        cu_seqlens_k: the same for keys, at most total_k.
        max_seqlen_q: no document has more queries. Stands where FlashAttention's
            ``flash_attn_varlen_func`` has it; may be left out, since no launch here is sized by it.
        max_seqlen_k: the same for keys.
        causal, scale, window, softcap, plan, return_lse: as in :func:`moda_attention`, within each
            document; its last query sits at its last key.

    Returns:
        ``out`` (total_q, HQ, DV) in q's dtype; with ``return_lse`` the pair ``(out, lse)``, ``lse``
        (HQ, total_q) in float32 (float64 for float64 inputs), natural logarithm.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of an unsupported or other dtype,
            or an argument has another library's name; the message says what it is called here.
        ValueError: shapes, devices or strides that do not fit, an option outside its range, or on
            a CPU borders of documents that fall or lie outside of the tokens.

    Example:
        >>> import torch
        >>> from moda_ops import moda_attention, moda_attention_varlen
        >>> q, k, v = torch.randn(7, 4, 32), torch.randn(7, 2, 32), torch.randn(7, 2, 32)
        >>> cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)  # 3, 0 and 4 tokens
        >>> out = moda_attention_varlen(q, k, v, [k], [v], cu_seqlens, cu_seqlens)
        >>> q, k, v = q[None, 3:], k[None, 3:], v[None, 3:]
        >>> torch.testing.assert_close(out[3:], moda_attention(q, k, v, [k], [v])[0])
    """
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_option("scale", scale)
    check_option("softcap", softcap)
    check_bool("return_lse", return_lse)
    check_plan(plan)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length is not None:
            check_int(name, length, 0)
    left, right = window_sides(window)
    out, lse = torch.ops.moda.attention_varlen(
        q,
        k,
        v,
        *slot_lists(k_depth, v_depth, PACKED),
        cu_seqlens_q,
        cu_seqlens_k,
        causal=check_bool("causal", causal),
        scale=scale,
        window_left=left,
        window_right=right,
        softcap=softcap,
        plan=plan,
    )
    return (out, lse.to(sum_dtype(q))) if return_lse else out
