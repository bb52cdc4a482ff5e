"""Attention and its closed-form gradient as whole-array products: the yardstick for kernels.

Forward and backward need three products, each over both kinds of keys at once:

    dots(rows, keys)        rows . keys, for scores and for dp
    mix(weights, keys)      sums of keys, for out and for dq
    spread(weights, rows)   sums of rows, for dk and for dv
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import Array, Depth, Inputs, Window, read_inputs, read_upstream
from moda_reference.gradients import Gradients, in_form_of
from moda_reference.masks import Mask, visible
from moda_reference.softcap import softcap_slope, softcapped


def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    k_depth: Depth = None,
    v_depth: Depth = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Attend under one softmax to the visible sequence keys and to the token's own depth keys.

    For query head h of token t, which reads KV head j = h // (HQ / H):

        a_n = scale q[t,h] . k[n,j]              for every visible sequence key n
        d_l = scale q[t,h] . k_depth[l][t,j]     for every depth slot l
        lse = log( sum_n exp a_n + sum_l exp d_l )
        out = sum_n exp(a_n - lse) v[n,j] + sum_l exp(d_l - lse) v_depth[l][t,j]

    (arXiv 2603.15619, section 2 d and figure 3).

    Args:
        q: (B, T, HQ, D), real numbers of any dtype, as all arrays here.
        k: (B, S, H, D), with HQ a multiple of H.
        v: (B, S, H, DV).
        k_depth: L slots (B, T, H, D) in a list, or packed (B, T, L, H, D), or None.
        v_depth: L slots (B, T, H, DV) in a list, or packed (B, T, L, H, DV), or None.
        causal: hide the keys after a query's own position, see `visible`.
        scale: factor of every dot product, 1 / sqrt(D) if None.
        window: how far a query sees in the sequence, see `visible`.
        softcap: c > 0 turns every score, of both kinds, into c tanh(score / c).

    Returns:
        out (B, T, HQ, DV) and lse (B, HQ, T), natural logarithm, both float64. A query that sees
        nothing at all has out 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.normal(size=(1, 3, heads, 4)) for heads in (4, 2, 2))
    >>> out, lse = attention(q, k, v, k_depth=[k], v_depth=[v])
    >>> out.shape, lse.shape
    ((1, 3, 4, 4), (1, 4, 3))
    >>> bool(np.allclose(out[:, 0], v[:, 0].repeat(2, axis=1)))    # token 0 sees its key twice
    True
    """
    x = read_inputs(q, k, v, k_depth, v_depth, causal, scale, window, softcap)
    return forward(x, visible(x.q.shape[1], x.k.shape[1], x.causal, x.window))


def attention_backward(
    dout: npt.ArrayLike,
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    k_depth: Depth = None,
    v_depth: Depth = None,
    *,
    dlse: npt.ArrayLike | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
) -> Gradients:
    """The gradients of a scalar that depends on out through `dout` and on lse through `dlse`.

    With p = exp(score - lse) and delta = dout . out - dlse per query:

        dv = p^T dout,  ds = p (dout . v - delta) scale,  dq = ds k,  dk = ds^T q

    and the same for depth, where slot l of token t hears from the G query heads of token t and from
    nothing else. A softcap multiplies ds by 1 - (score / softcap)^2.

    Args:
        dout: (B, T, HQ, DV).
        dlse: (B, HQ, T), zero if None.
        q, k, v, k_depth, v_depth, causal, scale, window, softcap: as in `attention`.

    Returns:
        `Gradients`, float64; for depth in the form given: a list, a packed array, or None. A query
        that sees nothing contributes zero, whatever its dout and dlse hold.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v, key, value = rng.normal(size=(5, 1, 3, 2, 4))
    >>> grads = attention_backward(np.ones_like(q), q, k, v, [key], [value])
    >>> bool(np.allclose(grads.dv.sum() + grads.dv_depth[0].sum(), q.size))    # p sums to 1
    True
    """
    x = read_inputs(q, k, v, k_depth, v_depth, causal, scale, window, softcap)
    dout, dlse = read_upstream(x, dout, dlse)
    sees = visible(x.q.shape[1], x.k.shape[1], x.causal, x.window)
    dq, dk, dv, dk_depth, dv_depth = backward(x, sees, dout, dlse)
    return Gradients(dq, dk, dv, in_form_of(k_depth, dk_depth), in_form_of(v_depth, dv_depth))


def forward(x: Inputs, sees: Mask) -> tuple[Array, Array]:
    """out (B, T, HQ, DV) and lse (B, HQ, T), where `sees` (T, S) masks the sequence."""
    y = _forward(x, sees)
    return _ungroup(y.out), _ungroup(y.lse)[..., 0].swapaxes(1, 2)


def backward(x: Inputs, sees: Mask, dout: Array, dlse: Array) -> tuple[Array, ...]:
    """dq, dk, dv, dk_depth and dv_depth, the last two packed."""
    S, H = x.k.shape[1:3]
    y = _forward(x, sees)

    sees_nothing = np.isneginf(y.lse)
    do = np.where(sees_nothing, 0.0, _group(dout, H))
    dlse = np.where(sees_nothing, 0.0, _group(dlse.swapaxes(1, 2)[..., None], H))
    delta = (do * y.out).sum(axis=-1, keepdims=True) - dlse
    ds = y.p * (dots(do, y.v) - delta) * softcap_slope(y.scores, x.softcap) * x.scale

    dk, dk_depth = _tokens_first(spread(ds, y.q, S))
    dv, dv_depth = _tokens_first(spread(y.p, do, S))
    return _ungroup(mix(ds, y.k)), dk, dv, dk_depth, dv_depth


class Keys(NamedTuple):
    """What a query reads, keys or values: those of its sequence and those of its own token."""

    sequence: Array  # [B, H, S, D]
    depth: Array  # [B, H, T, L, D]


def dots(rows: Array, keys: Keys) -> Array:
    """Dot products of rows [B, H, T, G, D] with keys: [B, H, T, G, S + L]."""
    S = keys.sequence.shape[-2]
    sequence = _fold(rows) @ keys.sequence.swapaxes(-1, -2)  # [B, H, T * G, S]
    depth = rows @ keys.depth.swapaxes(-1, -2)  # [B, H, T, G, L]
    return np.concatenate([sequence.reshape(*rows.shape[:-1], S), depth], axis=-1)


def mix(weights: Array, keys: Keys) -> Array:
    """Sums of keys under weights [B, H, T, G, S + L]: [B, H, T, G, D]."""
    S = keys.sequence.shape[-2]
    sequence = _fold(weights[..., :S]) @ keys.sequence  # [B, H, T * G, D]
    depth = weights[..., S:] @ keys.depth  # [B, H, T, G, D]
    return sequence.reshape(depth.shape) + depth


def spread(weights: Array, rows: Array, S: int) -> Keys:
    """Sums of rows [B, H, T, G, D] under weights [B, H, T, G, S + L], one for every key."""
    sequence = _fold(weights[..., :S]).swapaxes(-1, -2) @ _fold(rows)  # [B, H, S, D]
    depth = weights[..., S:].swapaxes(-1, -2) @ rows  # [B, H, T, L, D]
    return Keys(sequence, depth)


def softmax(scores: Array) -> tuple[Array, Array]:
    """Probabilities and lse [..., 1] over the last axis; all zero and -inf where all are -inf."""
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
    total = p.sum(axis=-1, keepdims=True)
    p /= np.where(total == 0, 1.0, total)
    with np.errstate(divide="ignore"):
        return p, top + np.log(total)


class _Forward(NamedTuple):
    q: Array  # [B, H, T, G, D]
    k: Keys
    v: Keys
    scores: Array  # [B, H, T, G, S + L], softcapped, of unseen keys too
    p: Array  # [B, H, T, G, S + L], zero for unseen keys
    out: Array  # [B, H, T, G, DV]
    lse: Array  # [B, H, T, G, 1]


def _forward(x: Inputs, sees: Mask) -> _Forward:
    T, S, H, L = x.q.shape[1], x.k.shape[1], x.k.shape[2], x.k_depth.shape[2]
    q = _group(x.q, H)
    k = Keys(x.k.swapaxes(1, 2), x.k_depth.transpose(0, 3, 1, 2, 4))
    v = Keys(x.v.swapaxes(1, 2), x.v_depth.transpose(0, 3, 1, 2, 4))
    scores = softcapped(dots(q, k) * x.scale, x.softcap)
    seen = np.ones((T, 1, S + L), dtype=bool)
    seen[:, 0, :S] = sees
    p, lse = softmax(np.where(seen, scores, -np.inf))
    return _Forward(q, k, v, scores, p, mix(p, v), lse)


def _group(x: Array, H: int) -> Array:
    """(B, T, HQ, D) to [B, H, T, G, D]: the queries of a token that share a KV head."""
    B, T, HQ, D = x.shape
    return x.reshape(B, T, H, HQ // H, D).transpose(0, 2, 1, 3, 4)


def _ungroup(x: Array) -> Array:
    """[B, H, T, G, D] back to (B, T, HQ, D)."""
    B, H, T, G, D = x.shape
    return x.transpose(0, 2, 1, 3, 4).reshape(B, T, H * G, D)


def _fold(x: Array) -> Array:
    """[B, H, T, G, D] to [B, H, T * G, D]: every row that reads one KV head's sequence."""
    B, H, T, G, D = x.shape
    return x.reshape(B, H, T * G, D)


def _tokens_first(keys: Keys) -> tuple[Array, Array]:
    """Back to (B, S, H, D) and (B, T, L, H, D)."""
    return keys.sequence.swapaxes(1, 2), keys.depth.transpose(0, 2, 3, 1, 4)
