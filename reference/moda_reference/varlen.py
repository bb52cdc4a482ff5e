"""Packed documents: attention of each document alone, laid one after the other."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import Array, Depth
from moda_reference.gradients import Gradients
from moda_reference.vectorised import attention, attention_backward


def attention_varlen(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    k_depth: Depth,
    v_depth: Depth,
    cu_seqlens_q: npt.ArrayLike,
    cu_seqlens_k: npt.ArrayLike,
    **options: Any,
) -> tuple[Array, Array]:
    """`attention` of the queries, keys and slots of each document, and of nothing else.

    Args:
        q: (total_q, HQ, D).
        k: (total_k, H, D).
        v: (total_k, H, DV).
        k_depth: L slots (total_q, H, D) in a list, or packed (total_q, L, H, D), or None.
        v_depth: L slots (total_q, H, DV) in a list, or packed (total_q, L, H, DV), or None.
        cu_seqlens_q: (documents + 1,) integers from 0 to total_q that never fall: document d has
            the queries from cu_seqlens_q[d] to before cu_seqlens_q[d + 1].
        cu_seqlens_k: the same for its keys, up to total_k.
        options: causal, scale, window and softcap, as in `attention`.

    Returns:
        out (total_q, HQ, DV) and lse (HQ, total_q), natural logarithm, both float64.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> q = k = v = np.arange(12.0).reshape(3, 2, 2)
    >>> out, lse = attention_varlen(q, k, v, None, None, [0, 1, 3], [0, 1, 3])
    >>> bool(np.allclose(out[:2], v[:2]))    # the first tokens of two documents see themselves
    True
    """
    rows, keys, values, *depth = _arrays(q, k, v, k_depth, v_depth)
    out, lse = np.zeros((*rows.shape[:2], values.shape[2])), np.zeros(rows.shape[1::-1])
    for t, s in _documents(cu_seqlens_q, cu_seqlens_k, len(rows), len(keys)):
        inputs = rows[None, t], keys[None, s], values[None, s], *(_of(x, t) for x in depth)
        (out[t],), (lse[:, t],) = attention(*inputs, **options)
    return out, lse


def attention_varlen_backward(
    dout: npt.ArrayLike,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    k_depth: Depth,
    v_depth: Depth,
    cu_seqlens_q: npt.ArrayLike,
    cu_seqlens_k: npt.ArrayLike,
    *,
    dlse: npt.ArrayLike | None = None,
    **options: Any,
) -> Gradients:
    """`attention_backward` of each document.

    Args:
        dout: (total_q, HQ, DV).
        dlse: (HQ, total_q), zero if None.
        q, k, v, k_depth, v_depth, cu_seqlens_q, cu_seqlens_k, options: as in `attention_varlen`.

    Returns:
        `Gradients`, float64; for depth in the form given: a list, a packed array, or None.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> q = k = v = np.arange(12.0).reshape(3, 2, 2)
    >>> grads = attention_varlen_backward(np.ones_like(q), q, k, v, [k], [v], [0, 1, 3], [0, 1, 3])
    >>> bool(np.allclose(grads.dv.sum() + grads.dv_depth[0].sum(), q.size))    # p sums to 1
    True
    """
    rows, keys, values, *depth = _arrays(q, k, v, k_depth, v_depth)
    dout = np.asarray(dout)
    dlse = np.zeros(rows.shape[1::-1]) if dlse is None else np.asarray(dlse)
    grads = [_zeros(x) for x in (rows, keys, values, *depth)]
    for t, s in _documents(cu_seqlens_q, cu_seqlens_k, len(rows), len(keys)):
        inputs = rows[None, t], keys[None, s], values[None, s], *(_of(x, t) for x in depth)
        part = attention_backward(dout[None, t], *inputs, dlse=dlse[None, :, t], **options)
        for where, into, grad in zip((t, s, s, t, t), grads, part, strict=True):
            _put(into, where, grad)
    return Gradients(*grads)


def _put(into: Any, where: slice, grad: Any) -> None:
    if isinstance(into, list):
        for slot, slot_grad in zip(into, grad, strict=True):
            _put(slot, where, slot_grad)
    elif into is not None:
        (into[where],) = grad


def _arrays(*inputs: Any) -> list[Any]:
    """Arrays of float64; a list stays a list, and None None."""

    def array(x: Any) -> Any:
        if x is None or isinstance(x, list):
            return x and [array(slot) for slot in x]
        return np.asarray(x, np.float64)

    return [array(x) for x in inputs]


def _zeros(x: Any) -> Any:
    if x is None or isinstance(x, list):
        return x and [np.zeros_like(slot) for slot in x]
    return np.zeros_like(x)


def _of(depth: Any, tokens: slice) -> Any:
    """Depth of some tokens, as a batch of one."""
    if isinstance(depth, list):
        return [slot[None, tokens] for slot in depth]
    return None if depth is None else depth[None, tokens]


def _documents(
    cu_seqlens_q: npt.ArrayLike, cu_seqlens_k: npt.ArrayLike, total_q: int, total_k: int
) -> Iterator[tuple[slice, slice]]:
    bounds = []
    for name, cu, total in (
        ("cu_seqlens_q", np.asarray(cu_seqlens_q), total_q),
        ("cu_seqlens_k", np.asarray(cu_seqlens_k), total_k),
    ):
        if cu.ndim != 1 or not np.issubdtype(cu.dtype, np.integer):
            raise TypeError(f"{name} must be a list of integers, got {cu.dtype} in {cu.ndim} axes")
        if len(cu) == 0 or cu[0] != 0 or cu[-1] != total or (np.diff(cu) < 0).any():
            raise ValueError(f"{name} must go from 0 to {total} and never fall, got {cu.tolist()}")
        bounds.append(cu)
    starts, key_starts = bounds
    if len(starts) != len(key_starts):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same length, "
            f"got {len(starts)} and {len(key_starts)}"
        )
    for d in range(len(starts) - 1):
        yield slice(starts[d], starts[d + 1]), slice(key_starts[d], key_starts[d + 1])
