"""The gradients of attention, one for every array argument."""

from collections.abc import Sequence
from typing import NamedTuple

from moda_reference._arguments import Array, Depth


class Gradients(NamedTuple):
    """Gradients in float64; the depth ones come in the form in which the depth keys were given."""

    dq: Array  # (B, T, HQ, D)
    dk: Array  # (B, S, H, D)
    dv: Array  # (B, S, H, DV)
    dk_depth: list[Array] | Array | None  # L arrays (B, T, H, D), or (B, T, L, H, D), or None
    dv_depth: list[Array] | Array | None  # L arrays (B, T, H, DV), or (B, T, L, H, DV), or None


def in_form_of(given: Depth, packed: Array) -> list[Array] | Array | None:
    """`packed` (B, T, L, H, D) as a list of slots, packed, or None, whichever `given` is."""
    if given is None:
        return None
    if isinstance(given, Sequence):
        return [packed[:, :, l] for l in range(packed.shape[2])]
    return packed
