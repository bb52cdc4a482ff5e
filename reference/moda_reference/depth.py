"""Attention over depth alone: the paper's Depth Attention (arXiv 2603.15619, section 2 c)."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import Array, Depth
from moda_reference.gradients import Gradients
from moda_reference.vectorised import attention, attention_backward


def depth_attention(
    q: npt.ArrayLike,
    k_depth: Depth,
    v_depth: Depth,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Attend to the depth keys of the query's own token: `attention` over no sequence at all.

        d_l = scale q[t,h] . k_depth[l][t,j]     for every depth slot l
        lse = log( sum_l exp d_l )
        out = sum_l exp(d_l - lse) v_depth[l][t,j]

    Args:
        q: (B, T, HQ, D).
        k_depth, v_depth, scale, softcap: as in `attention`. An empty list or None means DV = D.

    Returns:
        out (B, T, HQ, DV) and lse (B, HQ, T), natural logarithm, both float64; without slots 0 and
        -inf.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> rng = np.random.default_rng(0)
    >>> q, k_depth, v_depth = rng.normal(size=(3, 1, 5, 2, 4))
    >>> out, lse = depth_attention(q, [k_depth], [v_depth])
    >>> bool(np.allclose(out, v_depth))    # a softmax over one slot
    True
    """
    k, v = no_sequence(q, k_depth, v_depth)
    return attention(q, k, v, k_depth, v_depth, scale=scale, softcap=softcap)


def depth_attention_backward(
    dout: npt.ArrayLike,
    q: npt.ArrayLike,
    k_depth: Depth,
    v_depth: Depth,
    *,
    dlse: npt.ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Gradients:
    """`attention_backward` over no sequence at all.

    Args:
        dout: (B, T, HQ, DV).
        dlse: (B, HQ, T), zero if None.
        q, k_depth, v_depth, scale, softcap: as in `depth_attention`.

    Returns:
        `Gradients`, as of `attention_backward`; dk and dv have S = 0.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> rng = np.random.default_rng(0)
    >>> q, key, value = rng.normal(size=(3, 1, 5, 2, 4))
    >>> grads = depth_attention_backward(np.ones_like(q), q, [key], [value])
    >>> bool(np.allclose(grads.dv_depth[0], 1)), bool(np.allclose(grads.dq, 0))    # p = 1
    (True, True)
    """
    k, v = no_sequence(q, k_depth, v_depth)
    return attention_backward(
        dout, q, k, v, k_depth, v_depth, dlse=dlse, scale=scale, softcap=softcap
    )


def no_sequence(q: npt.ArrayLike, k_depth: Depth, v_depth: Depth) -> tuple[Array, Array]:
    """k (B, 0, H, D) and v (B, 0, H, DV), as far as shapes say; `attention` checks them all."""
    B, HQ, D = (np.shape(q)[axis] if np.ndim(q) == 4 else 1 for axis in (0, 2, 3))
    H = _axis(k_depth, -2, otherwise=HQ)
    return np.zeros((B, 0, H, D)), np.zeros((B, 0, H, _axis(v_depth, -1, otherwise=D)))


def _axis(depth: Depth, axis: int, otherwise: int) -> int:
    first = depth[0] if isinstance(depth, Sequence) and len(depth) else depth
    shape = () if first is None else np.asarray(first).shape
    return shape[axis] if len(shape) >= 2 else otherwise
