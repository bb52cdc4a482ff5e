"""Attention where a query also sees the depth keys of earlier tokens in its chunk.

A variant of the paper authors' code (`parallel_moda_chunk_visible`), not of the paper. Since a
depth key is now read by several tokens, it is like a key of the sequence, under its own mask.
"""

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import (
    Array,
    Depth,
    Inputs,
    Window,
    read_inputs,
    read_upstream,
)
from moda_reference.gradients import Gradients, in_form_of
from moda_reference.masks import Mask, chunk_visible, visible
from moda_reference.vectorised import backward, forward


def chunk_attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    k_depth: Depth,
    v_depth: Depth,
    chunk_size: int,
    *,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Causal `attention`, except that query t sees the depth slots of every token s of its chunk
    up to itself:

        a_n     = scale q[t,h] . k[n,j]              for every visible sequence key n
        d_{s,l} = scale q[t,h] . k_depth[l][s,j]     for s <= t with s // C = t // C, every slot l
        lse = log( sum_n exp a_n + sum_{s,l} exp d_{s,l} )
        out = sum_n exp(a_n - lse) v[n,j] + sum_{s,l} exp(d_{s,l} - lse) v_depth[l][s,j]

    Args:
        chunk_size: C >= 1 tokens, see `chunk_visible`; with 1 this is `attention`.
        q, k, v, k_depth, v_depth, scale, window, softcap: as in `attention`.

    Returns:
        out (B, T, HQ, DV) and lse (B, HQ, T), natural logarithm, both float64.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(3, 1, 6, 2, 4))
    >>> out, lse = chunk_attention(q, k, v, [k], [v], chunk_size=6)    # every key twice
    >>> _, plain = chunk_attention(q, k, v, [], [], chunk_size=6)
    >>> bool(np.allclose(lse, plain + np.log(2)))
    True
    """
    x = read_inputs(q, k, v, k_depth, v_depth, True, scale, window, softcap)
    return forward(*_as_sequence(x, chunk_size))


def chunk_attention_backward(
    dout: npt.ArrayLike,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    k_depth: Depth,
    v_depth: Depth,
    chunk_size: int,
    *,
    dlse: npt.ArrayLike | None = None,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
) -> Gradients:
    """`attention_backward` of `chunk_attention`: slot l of token s hears from the G query heads of
    every token t that sees it.

    Args:
        dout: (B, T, HQ, DV).
        dlse: (B, HQ, T), zero if None.
        q, k, v, k_depth, v_depth, chunk_size, scale, window, softcap: as in `chunk_attention`.

    Returns:
        `Gradients`, as of `attention_backward`.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v, key, value = rng.normal(size=(5, 1, 6, 2, 4))
    >>> grads = chunk_attention_backward(np.ones_like(q), q, k, v, [key], [value], chunk_size=4)
    >>> bool(np.allclose(grads.dv.sum() + grads.dv_depth[0].sum(), q.size))    # p sums to 1
    True
    """
    x = read_inputs(q, k, v, k_depth, v_depth, True, scale, window, softcap)
    dout, dlse = read_upstream(x, dout, dlse)
    dq, dk, dv, *_ = backward(*_as_sequence(x, chunk_size), dout, dlse)
    S = x.k.shape[1]
    dk_depth, dv_depth = dk[:, S:].reshape(x.k_depth.shape), dv[:, S:].reshape(x.v_depth.shape)
    return Gradients(
        dq, dk[:, :S], dv[:, :S], in_form_of(k_depth, dk_depth), in_form_of(v_depth, dv_depth)
    )


def _as_sequence(x: Inputs, chunk_size: int) -> tuple[Inputs, Mask]:
    """The same with depth rows s * L + l as sequence keys S + s * L + l; and who sees what."""
    (_, T, L), S = x.k_depth.shape[:3], x.k.shape[1]
    seen = chunk_visible(T, chunk_size).repeat(L, axis=1)  # [T, T * L]
    k, v = (
        np.concatenate([keys, depth.reshape(keys.shape[0], T * L, *keys.shape[2:])], axis=1)
        for keys, depth in ((x.k, x.k_depth), (x.v, x.v_depth))
    )
    x = x._replace(k=k, v=v, k_depth=x.k_depth[:, :, :0], v_depth=x.v_depth[:, :, :0])
    return x, np.concatenate([visible(T, S, True, x.window), seen], axis=1)
