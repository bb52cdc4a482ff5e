"""Softcap: bound a score smoothly to (-c, c), so that no key can win by sheer size."""

from typing import TypeVar

import numpy as np

from moda_reference._arguments import Array

Score = TypeVar("Score", float, Array)


def softcapped(score: Score, softcap: float | None) -> Score:
    """c tanh(score / c), or the score itself without a softcap.

    >>> float(softcapped(3000.0, softcap=50.0)), softcapped(3000.0, softcap=None)
    (50.0, 3000.0)
    """
    return score if softcap is None else softcap * np.tanh(score / softcap)


def softcap_slope(capped: Score, softcap: float | None) -> Score | float:
    """Derivative of `softcapped`, from the capped score: 1 - (capped / c)^2."""
    return 1.0 if softcap is None else 1 - (capped / softcap) ** 2
