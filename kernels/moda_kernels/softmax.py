"""Scores, the online softmax over them, and a score's gradient.

Scores are kept in base 2: exp(x) = 2^(x log2 e).
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) cancels."""
    x2 = x * x
    series = 0.0207946177 - 0.0058939453 * x2  # least squares on x^2 in [0, 0.36], 1.3 ulp
    series = x2 * (-0.333332975 + x2 * (0.133319153 + x2 * (-0.053783293 + x2 * series)))
    magnitude = tl.abs(x)
    large = 1 - 2 / (tl.exp2(magnitude * (2 * LOG2E)) + 1)
    return tl.where(magnitude < 0.55, x + x * series, tl.where(x < 0, -large, large))


@triton.jit
def base2_scores(qk, scale, softcap, dtype: tl.constexpr):
    """log2(e) times the score of each raw product q . k, and what rounding added to it: float32 inputs would
    notice that of a large score, 16-bit ones do not.
    """
    if softcap is not None:
        return tanh(qk * (scale / softcap)) * (softcap * LOG2E), 0.0
    elif dtype == tl.float32:
        scores = tl.fma(qk, scale * LOG2E, 0.0)  # not a product, which compilers would fuse into later sums
        excess = -tl.fma(qk, scale * LOG2E, -scores)
        return scores, tl.where(tl.abs(scores) < float("inf"), excess, 0.0)
    else:
        return qk * (scale * LOG2E), 0.0


@triton.jit
def softcap_slope(scores, softcap):
    """d score / d (scale q . k) = 1 - tanh^2, from the base-2 scores."""
    capped = scores / (softcap * LOG2E)
    return 1 - capped * capped


@triton.jit
def score_gradient(p, dp, delta, scores, softcap):
    """ds = p (dp - delta), by the score before the softcap; ``delta`` broadcasts against p."""
    ds = p * (dp - delta)
    if softcap is not None:
        ds *= softcap_slope(scores, softcap)
    return ds


@triton.jit
def online_softmax(m_i, l_i, scores, excess):
    """Take in scores along the last axis: new (m_i, l_i), the factor for what came before, and p.

    ``excess`` is what rounding added to the scores, see ``base2_scores``.
    """
    axis: tl.constexpr = len(scores.shape) - 1
    m_new = tl.maximum(m_i, tl.max(scores, axis))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    alpha = tl.exp2(m_i - shift)
    p = tl.exp2(scores - tl.expand_dims(shift, axis) - excess)
    return m_new, l_i * alpha + tl.sum(p, axis), alpha, p


@triton.jit
def base2_lse(lse, dtype: tl.constexpr):
    """log2(e) times a natural-log lse, and what rounding took from it: that of float32 inputs is float64."""
    if dtype == tl.float32:
        finite = tl.abs(lse) < float("inf")
        exact = tl.where(finite, lse, 0.0).to(tl.float64) * LOG2E
        high = exact.to(tl.float32)
        return tl.where(finite, high, lse.to(tl.float32)), (exact - high).to(tl.float32)
    else:
        return lse * LOG2E, tl.zeros_like(lse)


@triton.jit
def base2_log_p(scores, excess, lse, dtype: tl.constexpr):
    """log2 of the probabilities of ``base2_scores``; ``lse``, natural, broadcasts against them."""
    high, low = base2_lse(lse, dtype)
    return scores - high - (low + excess)


@triton.jit
def natural_lse(m_i, l_i, dtype: tl.constexpr):
    """The natural-log lse of an online softmax's base-2 state, in float64 for float32 inputs."""
    if dtype == tl.float32:
        return (m_i.to(tl.float64) + tl.log2(l_i).to(tl.float64)) * LN2
    else:
        return (m_i + tl.log2(l_i)) * LN2
