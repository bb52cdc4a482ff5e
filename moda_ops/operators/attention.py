"""``moda_attention`` and ``torch.ops.moda.attention``."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from moda_ops.operators.arguments import (
    DepthArgument,
    Window,
    attention_options,
    check_bool,
    check_tensors,
    slot_lists,
)
from moda_ops.operators.checks import Plan, check_attention, sum_dtype
from moda_ops.operators.definition import DEPTH, Attention, define_attention
from moda_ops.operators.options import Options
from moda_ops.operators.other_names import knows_other_names
from moda_ops.operators.slot_tensors import SlotTensors
from moda_ops.rules.flops import visible_pairs
from moda_ops.rules.sharding import BY_TOKEN_TOO


def _pairs(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    causal: bool = True,
    window_left: int | None = None,
    window_right: int | None = None,
    **_: Any,
) -> int:
    (B, T), S = q.shape[:2], k.shape[1]
    right = 0 if causal else window_right
    return B * (visible_pairs(T, S, window_left, right) + T * SlotTensors.of(k_depth).number)


def _forward(
    kernels: Any, q: Tensor, k: Tensor, v: Tensor, k_depth: list[Tensor], v_depth: list[Tensor],
    options: Options,
) -> Any:  # fmt: skip
    return kernels.attention(q, k, v, k_depth, v_depth, *options.resolved(q.shape[-1]))


def _backward(kernels: Any, dout: Tensor, dlse: Tensor | None, q: Tensor, *saved: Any) -> Any:
    *tensors, options = saved
    return kernels.attention_backward(dout, dlse, q, *tensors, *options.resolved(q.shape[-1]))


define_attention(
    Attention(
        "attention",
        f"Tensor q, Tensor k, Tensor v, {DEPTH}",
        trained=5,
        check=check_attention,
        forward=_forward,
        backward=_backward,
        pairs=_pairs,
        sharding=BY_TOKEN_TOO,
    )
)


@overload
def moda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: DepthArgument | None = ...,
    v_depth: DepthArgument | None = ...,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    plan: Plan = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def moda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: DepthArgument | None = ...,
    v_depth: DepthArgument | None = ...,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    plan: Plan = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@knows_other_names
def moda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: DepthArgument | None = None,
    v_depth: DepthArgument | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    plan: Plan = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend, under one softmax, to a sequence's keys and to the depth keys of the query's token.

    For batch b, token t, query head h and its key/value head j = h // G (all of one batch b)::

        a_n = scale * q[t,h] . k[n,j]               for every visible sequence key n
        d_l = scale * q[t,h] . k_depth[l][t,j]      for every depth slot l
        lse = log( sum_n exp a_n + sum_l exp d_l )
        out = sum_n exp(a_n - lse) v[n,j] + sum_l exp(d_l - lse) v_depth[l][t,j]

    (arXiv 2603.15619, section 2, mechanism (d); the kernel is its algorithm 1.) Differentiable in
    every tensor argument, through ``out`` and through ``lse``. Nothing is copied: tensors are read
    where they lie, with any strides whose last is 1.

    Args:
        q: queries, (B, T, HQ, D); float16, bfloat16 or float32, on a CPU also float64.
        k: sequence keys, (B, S, H, D), q's dtype. HQ = G * H for an integer G >= 1.
        v: sequence values, (B, S, H, DV), q's dtype. 1 <= D, DV <= 256.
        k_depth: depth keys, q's dtype: a list of L slots (B, T, H, D), or one packed tensor
            (B, T, L, H, D). ``None`` and the empty list mean L = 0, plain attention.
        v_depth: depth values in the same form: slots (B, T, H, DV) or packed (B, T, L, H, DV).
        causal: query t sits at key position t + S - T (bottom-right alignment) and sees the keys up
            to that position. ``False`` shows all keys. Depth slots are never masked.
        scale: factor on every score, within -1e30..1e30; default 1 / sqrt(D).
        window: ``(left, right)`` shows the keys within [position - left, position + right], both
            ends included, ``None`` on a side is unbounded; an int w means (w, w). Under ``causal``
            nothing on the right is visible whatever ``right`` says.
        softcap: c within 1e-7..1e30 replaces each score x, of both kinds, by c * tanh(x / c).
        plan: on a GPU, "fused" runs Triton kernels alone; "split" leaves the sequence to the
            library behind ``scaled_dot_product_attention`` and runs Triton kernels for depth;
            "auto" splits passes with much arithmetic in the sequence, where cuDNN takes them and
            was measured to be faster (``moda-ops doctor`` shows examples). cuDNN takes about a
            tenth of a second for each new shape: "fused" suits lengths that never repeat. Results
            are the same up to rounding; those of a split backward may differ from run to run, as
            the library's do, unless ``torch.use_deterministic_algorithms`` is on. Backward passes
            that a library cannot do, as of a gradient through ``lse``, are fused. On a CPU all
            plans are one.
        return_lse: also return ``lse``.

    Returns:
        ``out`` (B, T, HQ, DV) in q's dtype, contiguous; with ``return_lse`` the pair
        ``(out, lse)``, where ``lse`` is (B, HQ, T) in float32 (float64 for float64 inputs), natural
        logarithm. A row that sees nothing has out = 0, lse = -inf and zero gradients.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of an unsupported or other dtype,
            or an argument has another library's name; the text says what it is called here.
        ValueError: shapes, devices or strides that do not fit, an option outside its range, or
            ``plan="split"`` for a forward that no library covers (float32, a window, softcap,
            a scale that is not positive, a causal mask with S > T).

    Example:
        >>> import torch
        >>> from moda_ops import moda_attention
        >>> B, T, HQ, H, D = 2, 16, 4, 2, 32
        >>> q = torch.randn(B, T, HQ, D, requires_grad=True)
        >>> k, v = torch.randn(B, T, H, D), torch.randn(B, T, H, D)
        >>> slots = [torch.randn(B, T, H, D) for _ in range(3)]
        >>> out, lse = moda_attention(q, k, v, slots, slots, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 16, 4, 32]), torch.Size([2, 4, 16]))
        >>> out.sum().backward()
        >>> q.grad.shape
        torch.Size([2, 16, 4, 32])
    """
    check_tensors(q=q, k=k, v=v)
    check_bool("return_lse", return_lse)
    options = attention_options(causal, scale, window, softcap, plan)
    depth = slot_lists(k_depth, v_depth)
    out, lse = torch.ops.moda.attention(q, k, v, *depth, **options)
    return (out, lse.to(sum_dtype(q))) if return_lse else out
