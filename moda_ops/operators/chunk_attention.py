"""Depth shared within chunks: the public function and ``torch.ops.moda.chunk_attention``.

Its checks, and the shapes of its results, are those of ``moda::attention``.
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
    check_tensors,
    slot_lists,
    window_sides,
)
from moda_ops.operators.checks import check_attention, check_backward, check_chunk_size, sum_dtype
from moda_ops.operators.definition import LIBRARY, Options
from moda_ops.operators.other_names import knows_other_names

OPTIONS = "*, SymInt chunk_size, Scalar? scale=None, SymInt? window_left=None, Scalar? softcap=None"
LIBRARY.define(
    "chunk_attention(Tensor q, Tensor k, Tensor v, Tensor[] k_depth, Tensor[] v_depth, "
    f"{OPTIONS}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "chunk_attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    f"Tensor[] k_depth, Tensor[] v_depth, Tensor out, Tensor lse, {OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dk_depth, Tensor[] dv_depth)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@overload
def moda_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
    chunk_size: int,
    *,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def moda_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
    chunk_size: int,
    *,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@knows_other_names
def moda_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None,
    v_depth: Depth | None,
    chunk_size: int,
    *,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal MoDA in which a query also sees the depth keys of earlier tokens in its chunk.

    Chunks are tokens 0 to C - 1, C to 2 C - 1 and so on, C = ``chunk_size``. For batch b, token t,
    query head h and its key/value head j = h // G (all of one batch b)::

        a_n     = scale * q[t,h] . k[n,j]             for every visible sequence key n
        d_{s,l} = scale * q[t,h] . k_depth[l][s,j]    for s <= t with s // C == t // C, all slots l
        lse = log( sum_n exp a_n + sum_{s,l} exp d_{s,l} )
        out = sum_n exp(a_n - lse) v[n,j] + sum_{s,l} exp(d_{s,l} - lse) v_depth[l][s,j]

    (``parallel_moda_chunk_visible`` of the code to arXiv 2603.15619, where C is 64 // G; the paper
    has no equation for it.) C = 1 is ``moda_attention``. Differentiable in every tensor argument,
    through ``out`` and through ``lse``; results are the same bits from run to run. The work for
    depth is C / 2 times that of ``moda_attention`` on average.

    Args:
        q: queries, (B, T, HQ, D); float16, bfloat16 or float32, on a CPU also float64.
        k: sequence keys, (B, S, H, D), q's dtype. HQ = G * H for an integer G >= 1. Query t sits at
            key position t + S - T and sees the keys up to that position.
        v: sequence values, (B, S, H, DV), q's dtype. 1 <= D, DV <= 256.
        k_depth: depth keys, q's dtype: a list of L slots (B, T, H, D), or one packed tensor
            (B, T, L, H, D). ``None`` and the empty list mean L = 0.
        v_depth: depth values in the same form: slots (B, T, H, DV) or packed (B, T, L, H, DV).
        chunk_size: C >= 1, in tokens of q whatever S, G and the block sizes of kernels are; a C
            above T is one chunk.
        scale: factor on every score, within -1e30..1e30; default 1 / sqrt(D).
        window: ``(left, right)`` or an int, as for ``moda_attention``: of the sequence, a query
            sees the keys from position - left on. Depth keys are seen whatever it says.
        softcap: c within 1e-7..1e30 replaces each score x, of both kinds, by c * tanh(x / c).
        return_lse: also return ``lse``.

    Returns:
        ``out`` (B, T, HQ, DV) in q's dtype, contiguous; with ``return_lse`` the pair
        ``(out, lse)``, where ``lse`` is (B, HQ, T) in float32 (float64 for float64 inputs), natural
        logarithm.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of an unsupported or other dtype,
            or an argument has another library's name; the text says what it is called here.
        ValueError: shapes, devices or strides that do not fit, or an option outside its range.

    Example:
        >>> import torch
        >>> from moda_ops import moda_attention, moda_chunk_attention
        >>> q, k, v, key, value = torch.randn(5, 2, 16, 4, 32)
        >>> out, lse = moda_chunk_attention(q, k, v, [key], [value], 8, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 16, 4, 32]), torch.Size([2, 4, 16]))
        >>> alone = moda_chunk_attention(q, k, v, [key], [value], chunk_size=1)
        >>> torch.allclose(alone, moda_attention(q, k, v, [key], [value]), atol=1e-5)
        True
    """
    check_tensors(q=q, k=k, v=v)
    check_int("chunk_size", chunk_size, 1)
    check_option("scale", scale)
    check_option("softcap", softcap)
    check_bool("return_lse", return_lse)
    out, lse = torch.ops.moda.chunk_attention(
        q,
        k,
        v,
        *slot_lists(k_depth, v_depth),
        chunk_size=chunk_size,
        scale=scale,
        window_left=window_sides(window)[0],
        softcap=softcap,
    )
    return (out, lse.to(sum_dtype(q))) if return_lse else out


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    *,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    opts = Options(**options)
    check_attention(q, k, v, k_depth, v_depth, opts)
    check_chunk_size(chunk_size)
    scale, left, _, softcap, _ = opts.resolved(q.shape[-1])
    return ops.implementation(q).chunk_attention(
        q, k, v, k_depth, v_depth, chunk_size, scale, left, softcap
    )


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    *,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    check_chunk_size(chunk_size)
    return ops.attention_fake(q, k, v, k_depth, v_depth, **options)


def _attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    *,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    opts = Options(**options)
    check_attention(q, k, v, k_depth, v_depth, opts)
    check_chunk_size(chunk_size)
    check_backward(dout, dlse, out, lse, q, v)
    dout = torch.zeros_like(out) if dout is None else dout
    scale, left, _, softcap, _ = opts.resolved(q.shape[-1])
    return ops.implementation(q).chunk_attention_backward(
        dout, dlse, q, k, v, k_depth, v_depth, out, lse, chunk_size, scale, left, softcap
    )


def _attention_backward_fake(
    *inputs: Any, chunk_size: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    check_chunk_size(chunk_size)
    return ops.attention_backward_fake(*inputs, **options)


ops.register(
    "chunk_attention",
    _attention,
    _attention_fake,
    _attention_backward,
    _attention_backward_fake,
)
