"""Where attention went: the probability that depth slots and the first keys received.

``moda_depth_mass``, ``moda_sink_mass`` and ``torch.ops.moda.depth_mass``. They have no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from moda_ops import private
from moda_ops.operators import definition, eager
from moda_ops.operators.arguments import (
    DepthArgument,
    Window,
    check_bool,
    check_int,
    check_option,
    check_tensors,
    slot_lists,
    window_sides,
)
from moda_ops.operators.checks import (
    check_cu_seqlens,
    check_depth_mass,
    check_like,
    mass_lse_dtype,
    sum_dtype,
)
from moda_ops.operators.options import Options
from moda_ops.operators.other_names import knows_other_names
from moda_ops.rules import autocast
from moda_ops.rules.autocast import Autocast
from moda_ops.rules.autograd import without_gradient
from moda_ops.rules.operator import Operator, define
from moda_ops.rules.vmap import Vmap


@knows_other_names
def moda_depth_mass(
    q: Tensor,
    k_depth: DepthArgument | None,
    lse: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    r"""The probability that each depth slot received, mean over tokens.

    For batch b, query head h and its key/value head j = h // G::

        mass[h,l] = 1/T sum_t exp(scale * q[t,h] . k_depth[l][t,j] - lse[h,t])

    With ``lse`` of :func:`moda_attention` these are the shares of depth in the one softmax (arXiv
    2603.15619, section 4, figure 5, shows them token by token): what the slots do not have, the
    sequence received. With that of :func:`moda_depth_attention` they sum to 1.

    **Not differentiable**: the result never requires a gradient, and gives none to its arguments.

    It reads q, the depth keys and ``lse`` once, T HQ D + T L H D elements, and writes nothing as
    long as T but T / 32 partial sums: cheap enough to log while training. No atomics: results are
    the same bits from run to run.

    Args:
        q: queries, (B, T, HQ, D); dtypes and strides as in :func:`moda_attention`.
        k_depth: depth keys: a list of L slots (B, T, H, D), or one packed tensor (B, T, L, H, D);
            None is L = 0.
        lse: (B, HQ, T), natural logarithm, as the attention over these queries and keys returned
            it: float32 (float64 for float64 queries). A token of lse = -inf, which saw nothing,
            adds nothing.
        scale: factor on every score, as it was there; default 1 / sqrt(D).
        softcap: as it was there.

    Returns:
        (B, HQ, L), a probability, float32 at least; 0 where T = 0. Of packed documents, one batch
        entry (``q[None]``, slots ``[None]``, ``lse[None]``), the mean over all tokens.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of an unsupported or other dtype,
            or an argument has another library's name; the text says what it is called here.
        ValueError: shapes, devices or strides that do not fit, or an option outside its range.

    Example:
        >>> import torch
        >>> from moda_ops import moda_attention, moda_depth_mass
        >>> B, T, HQ, H, D = 2, 16, 4, 2, 32
        >>> q, (k, v) = torch.randn(B, T, HQ, D), torch.randn(2, B, T, H, D)
        >>> slots = [torch.randn(B, T, H, D) for _ in range(3)]
        >>> out, lse = moda_attention(q, k, v, slots, slots, return_lse=True)
        >>> mass = moda_depth_mass(q, slots, lse)
        >>> mass.shape, bool((mass.sum(-1) < 1).all())
        (torch.Size([2, 4, 3]), True)
    """
    check_tensors(q=q, lse=lse)
    check_option("scale", scale)
    check_option("softcap", softcap)
    (slots, _) = slot_lists(k_depth, k_depth)
    mass: Tensor = torch.ops.moda.depth_mass(q, slots, lse, scale=scale, softcap=softcap)
    return mass


@knows_other_names
def moda_sink_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    keys: int = 1,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The probability that the first keys of the sequence received: the attention sink.

    For batch b, query head h and its key/value head j = h // G, over the tokens t that see key n::

        mass[h] = 1/T sum_{n < keys} sum_t exp(scale * q[t,h] . k[n,j] - lse[h,t])

    (Attention sinks: arXiv 2309.17453, section 3.1; arXiv 2603.15619, figure 5, finds them weaker
    with depth.) Token 0 has no other key of the sequence to look at, so 1/T of it is not a choice.

    **Not differentiable**: the result never requires a gradient, and gives none to its arguments.
    It reads q and ``lse``, and no keys but these.

    Args:
        q: queries, (B, T, HQ, D).
        k: sequence keys, (B, S, H, D), as the attention had them.
        lse: (B, HQ, T), as that attention returned it, with depth or without.
        keys: how many first keys count; at least 1.
        causal, scale, window, softcap: as they were there.
        cu_seqlens: where packed documents begin, in queries and in keys, as in
            :meth:`DepthStream.attend`, for B = 1. First keys are then those of the document.

    Returns:
        (B, HQ), a probability, float32 at least.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of an unsupported or other dtype,
            or an argument has another library's name; the text says what it is called here.
        ValueError: shapes, devices or strides that do not fit, or an option outside its range.

    Example:
        >>> import torch
        >>> from moda_ops import moda_attention, moda_sink_mass
        >>> q, k = torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 1, 16)  # attends evenly
        >>> out, lse = moda_attention(q, k, k, return_lse=True)
        >>> moda_sink_mass(q, k, lse)  # (1 + 1/2 + 1/3 + 1/4) / 4
        tensor([[0.5208, 0.5208]])
    """
    check_tensors(q=q, k=k, lse=lse)
    check_int("keys", keys, 1)
    check_bool("causal", causal)
    check_option("scale", scale)
    check_option("softcap", softcap)
    left, right = window_sides(window)
    for name, x, dims in (("q", q, "(B, T, HQ, D)"), ("k", k, "(B, S, H, D)")):
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape {dims}, got {tuple(x.shape)}")
    (B, T, HQ, D), (_, S, H, _) = q.shape, k.shape
    dtype = k.dtype if autocast.enabled(q.device) else q.dtype  # autocast casts both
    check_like("k", k, (B, S, H, D), "(B, S, H, D)", dtype, q.device)
    check_like("lse", lse, (B, HQ, T), "(B, HQ, T)", mass_lse_dtype(q, lse), q.device)
    left = None if left is None else min(left, T + S)  # larger sides could wrap in 64 bits
    right = 0 if causal else None if right is None else min(right, T + S)
    token = torch.arange(T, device=q.device)
    first, length, after = token.new_zeros(T), token.new_full((T,), S), token.new_full((T,), T)
    if cu_seqlens is not None:
        first, length, after = _documents(q, S, token, cu_seqlens)
    position = token - after + length
    mass = lse.new_zeros(B, HQ, dtype=sum_dtype(q))
    for n in range(min(keys, S)):
        seen = n < length
        if left is not None:
            seen = seen & (position - left <= n)
        if right is not None:
            seen = seen & (position + right >= n)
        if cu_seqlens is None:
            slot = k[:, n : n + 1].expand(B, T, H, D)
        else:
            slot = k[:, (first + n).clamp(max=S - 1)]
        reached = lse.masked_fill(~seen, float("inf"))
        one = torch.ops.moda.depth_mass(q, [slot], reached, scale=scale, softcap=softcap)
        mass = mass + one[..., 0]
    return mass


def _documents(
    q: Tensor, S: int, token: Tensor, cu_seqlens: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token's document: its first key, how many keys it has, and the token after it.

    Tokens after the last document belong to one without keys. No document has keys past k's S.
    """
    if not isinstance(cu_seqlens, tuple) or len(cu_seqlens) != 2:
        raise TypeError(
            "cu_seqlens must be None or a pair (cu_seqlens_q, cu_seqlens_k), got "
            f"{type(cu_seqlens).__name__}"
        )
    cu_q, cu_k = cu_seqlens
    check_tensors(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    check_cu_seqlens(cu_q, cu_k, q)
    if q.shape[0] != 1:
        raise ValueError(f"packed documents need a batch of B = 1, got B = {q.shape[0]}")
    traced = torch.compiler.is_compiling() or private.transforms_active()
    if type(cu_q) is Tensor and cu_q.device.type == "cpu" and not traced:
        eager.bounds("cu_seqlens_q", cu_q, q.shape[1])
        eager.bounds("cu_seqlens_k", cu_k, S)
    cu_q, cu_k = (torch.cat([cu, cu[-1:]]).long() for cu in (cu_q, cu_k.clamp(0, S)))
    document = torch.searchsorted(cu_q[:-1], token, right=True) - 1
    first, after = cu_k[document], cu_q[document + 1]
    return first, cu_k[document + 1] - first, after


def _mass(q: Tensor, k_depth: list[Tensor], lse: Tensor, **given: Any) -> Tensor:
    options = Options(**given)
    check_depth_mass(q, k_depth, lse, options)
    scale, _, _, softcap, _ = options.resolved(q.shape[-1])
    mass: Tensor = definition.implementation(q).depth_mass(q, k_depth, lse, scale, softcap)
    return mass


def _mass_fake(q: Tensor, k_depth: list[Tensor], lse: Tensor, **given: Any) -> Tensor:
    sizes = check_depth_mass(q, k_depth, lse, Options(**given))
    return q.new_empty(sizes.shape("B HQ L"), dtype=sum_dtype(q))


define(
    Operator(
        "depth_mass(Tensor q, Tensor[] k_depth, Tensor lse, *, Scalar? scale=None, "
        "Scalar? softcap=None) -> Tensor mass",
        _mass,
        _mass_fake,
        without_gradient,
        Autocast(as_given=("lse",)),
        Vmap(),
    )
)
