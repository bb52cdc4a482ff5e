"""Depth shared within chunks: ``moda_chunk_attention`` and ``torch.ops.moda.chunk_attention``."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from moda_ops.operators.arguments import (
    DepthArgument,
    Window,
    check_bool,
    check_int,
    check_tensors,
    score_options,
    slot_lists,
    window_sides,
)
from moda_ops.operators.checks import Sizes, check_attention, check_chunk_size, sum_dtype
from moda_ops.operators.definition import DEPTH, Attention, define_attention
from moda_ops.operators.options import Options
from moda_ops.operators.other_names import knows_other_names
from moda_ops.operators.slot_tensors import SlotTensors
from moda_ops.rules.flops import visible_pairs
from moda_ops.rules.sharding import BY_BATCH_AND_HEAD


def _check(*arguments: Any) -> Sizes:
    check_chunk_size(arguments[-1].chunk_size)
    return check_attention(*arguments)


def _resolved(q: Tensor, options: Options) -> tuple[Any, ...]:
    scale, left, _, softcap, _ = options.resolved(q.shape[-1])
    return options.chunk_size, scale, left, softcap


def _forward(kernels: Any, q: Tensor, *inputs: Any) -> Any:
    *tensors, options = inputs
    return kernels.chunk_attention(q, *tensors, *_resolved(q, options))


def _backward(kernels: Any, dout: Tensor, dlse: Tensor | None, q: Tensor, *saved: Any) -> Any:
    *tensors, options = saved
    return kernels.chunk_attention_backward(dout, dlse, q, *tensors, *_resolved(q, options))


def _pairs(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    chunk_size: int,
    window_left: int | None = None,
    **_: Any,
) -> int:
    (B, T), S = q.shape[:2], k.shape[1]
    whole, rest = divmod(T, chunk_size)
    tokens = whole * visible_pairs(chunk_size, chunk_size, None, 0)
    tokens += visible_pairs(rest, rest, None, 0)
    return B * (visible_pairs(T, S, window_left, 0) + tokens * SlotTensors.of(k_depth).number)


define_attention(
    Attention(
        "chunk_attention",
        f"Tensor q, Tensor k, Tensor v, {DEPTH}",
        trained=5,
        check=_check,
        forward=_forward,
        backward=_backward,
        pairs=_pairs,
        sharding=BY_BATCH_AND_HEAD,
        options="*, SymInt chunk_size, Scalar? scale=None, SymInt? window_left=None, "
        "Scalar? softcap=None",
    )
)


@overload
def moda_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
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
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
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
    k_depth: DepthArgument | None,
    v_depth: DepthArgument | None,
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
    check_bool("return_lse", return_lse)
    options = score_options(scale, softcap) | dict(window_left=window_sides(window)[0])
    depth = slot_lists(k_depth, v_depth)
    out, lse = torch.ops.moda.chunk_attention(q, k, v, *depth, chunk_size=chunk_size, **options)
    return (out, lse.to(sum_dtype(q))) if return_lse else out
