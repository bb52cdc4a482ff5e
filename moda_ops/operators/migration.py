"""From the layout of the paper authors' package (github.com/hustvl/MoDA) to this one's, and back.

Theirs folds the group into rows and the slots into columns, and measures ``lse`` in bits:

======  ===================================  ==============================
tensor  theirs                               ours
======  ===================================  ==============================
q       (B, T * G, H, D), row t * G + g      (B, T, HQ, D), head j * G + g
k, v    (B, T, H, D)                         the same
depth   (B, T * L, H, D), row t * L + l      packed (B, T, L, H, D)
out     (B, T * G, H, DV)                    (B, T, HQ, DV)
lse     (B, T * G, H), base 2                (B, HQ, T), natural
======  ===================================  ==============================
"""

import math
from typing import overload

from torch import Tensor

from moda_ops.operators.arguments import check_int, check_tensors
from moda_ops.operators.checks import check_both


@overload
def from_authors(
    q: Tensor, cached_k: Tensor, cached_v: Tensor, *, moda_group_num: int = ...
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def from_authors(
    q: Tensor, cached_k: None = ..., cached_v: None = ..., *, moda_group_num: int = ...
) -> tuple[Tensor, None, None]: ...


def from_authors(
    q: Tensor,
    cached_k: Tensor | None = None,
    cached_v: Tensor | None = None,
    *,
    moda_group_num: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The arguments of the authors' ``parallel_moda`` and its variants as this package takes them.

    Their k and v stay as they are. Depth comes back as views, q as a view where G = 1 or H = 1.
    Else q is a copy, and has to be: queries that share a key/value head lie H heads apart in theirs
    and side by side in ours, and no one stride steps from head to head. Differentiable. Scores are
    scaled by 1 / sqrt(D) in both packages, if nothing else is said.

    Args:
        q: (B, T * G, H, D), row t * G + g is query g of token t. It may also have a multiple of H
            heads, as theirs: they are then heads of one group, each with G rows a token.
        cached_k: depth keys (B, T * L, H, D), row t * L + l is slot l of token t; or None.
        cached_v: depth values (B, T * L, H, DV) likewise. Where the cache is longer than what is
            written (their ``current_depth``), slice the result: ``k_depth[:, :, :current_depth]``.
        moda_group_num: G.

    Returns:
        ``(q, k_depth, v_depth)``: (B, T, H * G, D), and packed (B, T, L, H, D) and (B, T, L, H, DV)
        or None, in the dtypes given.

    Raises:
        TypeError: a tensor is none, or ``moda_group_num`` is not an int.
        ValueError: shapes that do not fit each other or ``moda_group_num``.

    Example:
        >>> import torch
        >>> from moda_ops import from_authors, moda_attention, to_authors
        >>> B, T, G, H, D, L = 1, 6, 4, 2, 16, 3
        >>> q, k, v = torch.randn(B, T * G, H, D), torch.randn(B, T, H, D), torch.randn(B, T, H, D)
        >>> cached_k, cached_v = torch.randn(2, B, T * L, H, D)

        What was ``parallel_moda(q, k, v, cached_k=cached_k, cached_v=cached_v, moda_group_num=G,
        need_lse=True)`` becomes

        >>> q, k_depth, v_depth = from_authors(q, cached_k, cached_v, moda_group_num=G)
        >>> out, lse = moda_attention(q, k, v, k_depth, v_depth, return_lse=True)
        >>> out, lse = to_authors(out, lse, moda_group_num=G)
        >>> out.shape, lse.shape
        (torch.Size([1, 24, 2, 16]), torch.Size([1, 24, 2]))
    """
    check_tensors(q=q)
    G = check_int("moda_group_num", moda_group_num, 1)
    if q.dim() != 4 or q.shape[1] % G:
        raise ValueError(
            f"q must have shape (B, T * G, H, D) with G = moda_group_num = {G}, got "
            f"{tuple(q.shape)}"
        )
    T = q.shape[1] // G
    check_both("cached_k", cached_k, "cached_v", cached_v)
    unfolded = q.unflatten(1, (T, G)).transpose(2, 3).flatten(2, 3)
    if cached_k is None or cached_v is None:
        return unfolded, None, None
    check_tensors(cached_k=cached_k, cached_v=cached_v)
    B, D = q.shape[0], q.shape[3]
    rows, H = cached_k.shape[1:3] if cached_k.dim() == 4 else (0, 0)
    for name, cached, dims, expected in (
        ("cached_k", cached_k, "(B, T * L, H, D)", (B, rows, H, D)),
        ("cached_v", cached_v, "(B, T * L, H, DV)", (B, rows, H, *cached_v.shape[-1:])),
    ):
        if cached.shape != expected or (rows % T if T else rows):
            raise ValueError(
                f"{name} must have shape {dims} with B = {B}, T = {T}, D = {D} and the same L and "
                f"H for both, got {tuple(cached.shape)}"
            )
    if H == 0 or q.shape[2] % H:
        raise ValueError(f"q must have a multiple of cached_k's H = {H} heads, got {q.shape[2]}")
    L = rows // T if T else 0
    return unfolded, cached_k.unflatten(1, (T, L)), cached_v.unflatten(1, (T, L))


def to_authors(out: Tensor, lse: Tensor, *, moda_group_num: int = 1) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` as the authors' package returns them.

    ``out`` is a view where G = 1 or H = 1 and else a copy, for the reason that ``from_authors``
    gives; ``lse`` is always new, being lse / ln 2. Differentiable.

    Args:
        out: (B, T, HQ, DV), as ``moda_attention`` returns it.
        lse: (B, HQ, T), natural logarithm, likewise.
        moda_group_num: G = HQ / H.

    Returns:
        ``(out, lse)``: (B, T * G, H, DV) and (B, T * G, H), base 2, in the dtypes given.

    Raises:
        TypeError: a tensor is none, or ``moda_group_num`` is not an int.
        ValueError: shapes that do not fit each other or ``moda_group_num``.

    Example:
        >>> import torch
        >>> from moda_ops import to_authors
        >>> out, lse = to_authors(torch.zeros(1, 5, 6, 16), torch.zeros(1, 6, 5), moda_group_num=3)
        >>> out.shape, lse.shape
        (torch.Size([1, 15, 2, 16]), torch.Size([1, 15, 2]))
    """
    check_tensors(out=out, lse=lse)
    G = check_int("moda_group_num", moda_group_num, 1)
    if out.dim() != 4 or out.shape[2] % G:
        raise ValueError(
            f"out must have shape (B, T, H * G, DV) with G = moda_group_num = {G}, got "
            f"{tuple(out.shape)}"
        )
    B, T, HQ, _ = out.shape
    if lse.shape != (B, HQ, T):
        raise ValueError(f"lse must have shape (B, HQ, T) = {(B, HQ, T)}, got {tuple(lse.shape)}")
    folded = out.unflatten(2, (HQ // G, G)).transpose(2, 3).flatten(1, 2)
    bits = lse.unflatten(1, (HQ // G, G)).permute(0, 3, 2, 1).flatten(1, 2) * math.log2(math.e)
    return folded, bits
