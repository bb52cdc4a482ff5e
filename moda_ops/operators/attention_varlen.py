"""Packed documents: ``moda_attention_varlen`` and ``torch.ops.moda.attention_varlen``.

The implementations see one batch entry whose documents hide each other.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from moda_ops.operators.arguments import (
    DepthArgument,
    Window,
    attention_options,
    check_bool,
    check_int,
    check_tensors,
    slot_lists,
)
from moda_ops.operators.checks import Plan, check_varlen, sum_dtype
from moda_ops.operators.definition import DEPTH, Attention, define_attention
from moda_ops.operators.options import Options
from moda_ops.operators.other_names import knows_other_names
from moda_ops.operators.slot_tensors import SlotTensors
from moda_ops.rules.flops import known_documents, visible_pairs
from moda_ops.rules.sharding import PACKED_BY_HEAD
from moda_ops.rules.vmap import Arguments, Vmap, mapped_rows


def _batch_of_one(x: Any) -> Any:
    return [y.unsqueeze(0) for y in x] if isinstance(x, list) else x.unsqueeze(0)


def _only_entry(x: Any) -> Any:
    return [y.squeeze(0) for y in x] if isinstance(x, list) else x.squeeze(0)


def _forward(
    kernels: Any, q: Tensor, k: Tensor, v: Tensor, k_depth: list[Tensor], v_depth: list[Tensor],
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options,
) -> Any:  # fmt: skip
    results = kernels.attention(
        *map(_batch_of_one, (q, k, v, k_depth, v_depth)),
        *options.resolved(q.shape[-1]),
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
    )
    return tuple(map(_only_entry, results))


def _backward(
    kernels: Any, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    k_depth: list[Tensor], v_depth: list[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    out: Tensor, lse: Tensor, options: Options,
) -> Any:  # fmt: skip
    grads = kernels.attention_backward(
        _batch_of_one(dout),
        None if dlse is None else _batch_of_one(dlse),
        *map(_batch_of_one, (q, k, v, k_depth, v_depth, out, lse)),
        *options.resolved(q.shape[-1]),
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
    )
    return tuple(map(_only_entry, grads))


def _pairs(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    window_left: int | None = None,
    window_right: int | None = None,
    **_: Any,
) -> int:
    T, S, right = q.shape[0], k.shape[0], 0 if causal else window_right
    documents = known_documents((cu_seqlens_q, cu_seqlens_k), T, S)
    sequence = sum(visible_pairs(t, s, window_left, right) for t, s in documents)
    return sequence + T * SlotTensors.of(k_depth, 1).number


def _fold_documents(arguments: Arguments, size: int) -> dict[str, Any]:
    """Where the documents of all packed sequences begin, once these stand one after the other.

    A sequence's tokens before its first document become two documents of their own, one of queries
    alone and one of keys alone, which see nothing of each other, nor of another sequence. So do
    those after its last document.
    """
    totals = {}
    for side, tokens in (("q", arguments["q"]), ("k", arguments["k"])):
        shape = list(tokens.value.shape)
        if tokens.dim is not None:
            shape.pop(tokens.dim)
        totals[side] = shape[0]
    starts = {side: mapped_rows(arguments[f"cu_seqlens_{side}"], size) for side in totals}
    zero = starts["k"].new_zeros(size, 1)
    first = {"q": starts["q"][:, :1], "k": zero}  # queries alone, then keys alone
    last = {"q": zero + totals["q"], "k": starts["k"][:, -1:]}  # the same
    folded = {}
    for side, total in totals.items():
        offset = torch.arange(size, device=starts[side].device, dtype=torch.int32) * total
        begins = torch.cat([zero, first[side], starts[side], last[side]], 1) + offset[:, None]
        end = begins.new_full((1,), size * total)
        folded[f"cu_seqlens_{side}"] = torch.cat([begins.flatten(), end])
    return folded


define_attention(
    Attention(
        "attention_varlen",
        f"Tensor q, Tensor k, Tensor v, {DEPTH}, Tensor cu_seqlens_q, Tensor cu_seqlens_k",
        trained=5,
        check=check_varlen,
        forward=_forward,
        backward=_backward,
        pairs=_pairs,
        sharding=PACKED_BY_HEAD,
        vmap=Vmap({"lse": 1, "dlse": 1}, _fold_documents),
        results=("total_q HQ DV", "HQ total_q"),
    )
)


@overload
def moda_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
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
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
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
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
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
    check_bool("return_lse", return_lse)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if length is not None:
            check_int(name, length, 0)
    options = attention_options(causal, scale, window, softcap, plan)
    depth = slot_lists(k_depth, v_depth, "total_q")
    out, lse = torch.ops.moda.attention_varlen(
        q, k, v, *depth, cu_seqlens_q, cu_seqlens_k, **options
    )
    return (out, lse.to(sum_dtype(q))) if return_lse else out
