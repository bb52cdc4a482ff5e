"""Where attention went: what depth slots and the first keys received, mean over tokens."""

import numpy as np
import numpy.typing as npt

from moda_reference._arguments import Array, Depth, Window, bind, integer, read_inputs
from moda_reference.depth import no_sequence
from moda_reference.masks import visible
from moda_reference.softcap import softcapped


def depth_mass(
    q: npt.ArrayLike,
    k_depth: Depth,
    lse: npt.ArrayLike,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """What each depth slot received of the softmax whose logarithmic sum is lse.

        mass[b,h,l] = 1/T sum_t exp(d_l - lse[b,h,t]),   d_l = scale q[b,t,h] . k_depth[l][b,t,j]

    (arXiv 2603.15619, figure 5, token by token.)

    Args:
        q: (B, T, HQ, D).
        k_depth: L slots (B, T, H, D) in a list, or packed (B, T, L, H, D), or None.
        lse: (B, HQ, T), as `attention` returned it; a token of -inf adds nothing.
        scale, softcap: as in `attention`.

    Returns:
        (B, HQ, L), float64; zero where T = 0.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> from moda_reference import depth_attention
    >>> rng = np.random.default_rng(0)
    >>> q, key, other = rng.normal(size=(3, 1, 5, 2, 4))
    >>> _, lse = depth_attention(q, [key, other], [key, other])
    >>> bool(np.allclose(depth_mass(q, [key, other], lse).sum(-1), 1))
    True
    """
    k, v = no_sequence(q, k_depth, k_depth)
    x = read_inputs(q, k, v, k_depth, k_depth, True, scale, None, softcap)
    B, T, HQ, _ = x.q.shape
    lse = bind("lse", lse, "B HQ T", {"B": B, "HQ": HQ, "T": T})
    keys = x.k_depth.repeat(HQ // x.k.shape[2], axis=3)  # (B, T, L, HQ, D)
    scores = softcapped(np.einsum("bthd,btlhd->bhtl", x.q, keys) * x.scale, x.softcap)
    return _mean(scores, lse)


def sink_mass(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    lse: npt.ArrayLike,
    *,
    keys: int = 1,
    causal: bool = True,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
) -> Array:
    """What the first keys of the sequence together received (attention sinks: arXiv 2309.17453).

        mass[b,h] = 1/T sum_{n < keys} sum_t exp(a_n - lse[b,h,t]),   over the t that see key n

    Args:
        q: (B, T, HQ, D).
        k: (B, S, H, D).
        lse: (B, HQ, T), as `attention` returned it.
        keys: how many first keys count.
        causal, scale, window, softcap: as in `attention`.

    Returns:
        (B, HQ), float64.

    Raises:
        TypeError, ValueError: an argument is not what is said above; the text names it.

    >>> from moda_reference import attention
    >>> q = k = np.zeros((1, 4, 1, 2))
    >>> sink_mass(q, k, attention(q, k, k)[1]) * 4    # 1 + 1/2 + 1/3 + 1/4
    array([[2.08333333]])
    """
    keys = integer("keys", keys, 1)
    x = read_inputs(q, k, k, None, None, causal, scale, window, softcap)
    (B, T, HQ, _), (_, S, H, _) = x.q.shape, x.k.shape
    lse = bind("lse", lse, "B HQ T", {"B": B, "HQ": HQ, "T": T})
    scores = np.einsum("bthd,bnhd->bhtn", x.q, x.k.repeat(HQ // H, axis=2)) * x.scale
    seen = visible(T, S, x.causal, x.window)
    return _mean(np.where(seen, softcapped(scores, x.softcap), -np.inf)[..., :keys], lse).sum(-1)


def _mean(scores: Array, lse: Array) -> Array:
    """The mean over T of the probabilities of scores [B, HQ, T, n]."""
    p = np.exp(scores - np.where(np.isneginf(lse), np.inf, lse)[..., None])
    mean: Array = p.sum(axis=2) / max(scores.shape[2], 1)
    return mean
