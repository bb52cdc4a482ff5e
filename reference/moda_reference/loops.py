"""Attention as its equations say it, one query at a time."""

from itertools import product
from math import exp, log

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import Array, Depth, Inputs, Window, read_inputs, read_upstream
from moda_reference.gradients import Gradients, in_form_of
from moda_reference.masks import Mask, visible
from moda_reference.softcap import softcap_slope, softcapped


def attention_loops(
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
    """`attention`, with its arguments and results, in plain loops.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(3, 1, 1, 1, 4))
    >>> out, lse = attention_loops(q, k, v)
    >>> bool(np.allclose(out, v)), bool(np.isclose(lse.item(), q.ravel() @ k.ravel() / 2))
    (True, True)
    """
    x = read_inputs(q, k, v, k_depth, v_depth, causal, scale, window, softcap)
    (B, T, HQ, _), (_, S, H, DV) = x.q.shape, x.v.shape
    sees = visible(T, S, x.causal, x.window)

    out = np.zeros((B, T, HQ, DV))
    lse = np.full((B, HQ, T), -np.inf)
    for b, t, h in product(range(B), range(T), range(HQ)):
        j = h // (HQ // H)
        a, d = _scores(x, sees, b, t, h)
        lse[b, h, t] = _log_sum_exp([*a.values(), *d.values()])
        for n, a_n in a.items():
            out[b, t, h] += exp(a_n - lse[b, h, t]) * x.v[b, n, j]
        for l, d_l in d.items():
            out[b, t, h] += exp(d_l - lse[b, h, t]) * x.v_depth[b, t, l, j]
    return out, lse


def attention_backward_loops(
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
    """`attention_backward`, with its arguments and results, in plain loops.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(3, 1, 1, 1, 4))
    >>> grads = attention_backward_loops(np.zeros_like(v), q, k, v, dlse=np.ones((1, 1, 1)))
    >>> bool(np.allclose(grads.dq, k / 2)), bool(np.allclose(grads.dv, 0))    # lse = q . k / 2
    (True, True)
    """
    x = read_inputs(q, k, v, k_depth, v_depth, causal, scale, window, softcap)
    do, dlse = read_upstream(x, dout, dlse)
    (B, T, HQ, _), (_, S, H, _) = x.q.shape, x.v.shape
    sees = visible(T, S, x.causal, x.window)
    out, lse = attention_loops(
        q, k, v, k_depth, v_depth, causal=causal, scale=scale, window=window, softcap=softcap
    )

    dq, dk, dv = np.zeros_like(x.q), np.zeros_like(x.k), np.zeros_like(x.v)
    dk_depth, dv_depth = np.zeros_like(x.k_depth), np.zeros_like(x.v_depth)
    for b, t, h in product(range(B), range(T), range(HQ)):
        j = h // (HQ // H)
        a, d = _scores(x, sees, b, t, h)
        delta = do[b, t, h] @ out[b, t, h] - dlse[b, h, t]
        for n, a_n in a.items():
            p = exp(a_n - lse[b, h, t])
            ds = p * (do[b, t, h] @ x.v[b, n, j] - delta)
            ds *= x.scale * softcap_slope(a_n, x.softcap)
            dv[b, n, j] += p * do[b, t, h]
            dq[b, t, h] += ds * x.k[b, n, j]
            dk[b, n, j] += ds * x.q[b, t, h]
        for l, d_l in d.items():
            p = exp(d_l - lse[b, h, t])
            ds = p * (do[b, t, h] @ x.v_depth[b, t, l, j] - delta)
            ds *= x.scale * softcap_slope(d_l, x.softcap)
            dv_depth[b, t, l, j] += p * do[b, t, h]
            dq[b, t, h] += ds * x.k_depth[b, t, l, j]
            dk_depth[b, t, l, j] += ds * x.q[b, t, h]
    return Gradients(dq, dk, dv, in_form_of(k_depth, dk_depth), in_form_of(v_depth, dv_depth))


def _scores(
    x: Inputs, sees: Mask, b: int, t: int, h: int
) -> tuple[dict[int, float], dict[int, float]]:
    """The scores of one query: a_n for every visible sequence key n, d_l for every slot l."""
    j = h // (x.q.shape[2] // x.k.shape[2])

    def score(key: Array) -> float:
        return softcapped(x.scale * float(x.q[b, t, h] @ key), x.softcap)

    a = {n: score(x.k[b, n, j]) for n in range(x.k.shape[1]) if sees[t, n]}
    d = {l: score(x.k_depth[b, t, l, j]) for l in range(x.k_depth.shape[2])}
    return a, d


def _log_sum_exp(scores: list[float]) -> float:
    """log(sum(exp(scores))) without overflow; -inf for no score at all."""
    if not scores:
        return -np.inf
    top = max(scores)
    return top + log(sum(exp(score - top) for score in scores))
