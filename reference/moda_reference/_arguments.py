"""What the public functions accept: checked once and brought to one form, in float64."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Depth = Sequence[npt.ArrayLike] | npt.ArrayLike | None
Window = int | tuple[int | None, int | None] | None

MAY_BE_ZERO = frozenset("BTSL") | {"max_pages"}


class Inputs(NamedTuple):
    """The checked arguments of a forward pass; depth is packed, and without depth L = 0."""

    q: Array  # (B, T, HQ, D)
    k: Array  # (B, S, H, D)
    v: Array  # (B, S, H, DV)
    k_depth: Array  # (B, T, L, H, D)
    v_depth: Array  # (B, T, L, H, DV)
    causal: bool
    window: tuple[int | None, int | None]
    scale: float
    softcap: float | None


def read_inputs(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    k_depth: Depth,
    v_depth: Depth,
    causal: bool,
    scale: float | None,
    window: Window,
    softcap: float | None,
) -> Inputs:
    """Check the arguments against each other and convert them; an error names the wrong one."""
    sizes: dict[str, int] = {}
    q_array = bind("q", q, "B T HQ D", sizes)
    k_array = bind("k", k, "B S H D", sizes)
    v_array = bind("v", v, "B S H DV", sizes)
    if sizes["HQ"] % sizes["H"]:
        raise ValueError(
            f"q has HQ={sizes['HQ']} heads and k has H={sizes['H']}; HQ must be a multiple of H"
        )
    k_packed, v_packed = read_depth(k_depth, v_depth, sizes)
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal must be True or False, got {causal!r}")
    return Inputs(
        q_array,
        k_array,
        v_array,
        k_packed,
        v_packed,
        bool(causal),
        window_sides(window),
        1 / math.sqrt(sizes["D"]) if scale is None else _finite("scale", scale),
        None if softcap is None else _finite("softcap", softcap, positive=True),
    )


def read_upstream(
    x: Inputs, dout: npt.ArrayLike, dlse: npt.ArrayLike | None
) -> tuple[Array, Array]:
    """Check the gradients that arrive at out and lse; a missing `dlse` is zero."""
    B, T, HQ, _ = x.q.shape
    sizes = {"B": B, "T": T, "HQ": HQ, "DV": x.v.shape[-1]}
    if dlse is None:
        dlse = np.zeros((B, HQ, T))
    return bind("dout", dout, "B T HQ DV", sizes), bind("dlse", dlse, "B HQ T", sizes)


def window_sides(window: Window) -> tuple[int | None, int | None]:
    """The pair (left, right) that `window` means; None is a side without bound."""
    wrong = (
        f"window must be None, an integer >= 0, or a pair (left, right) of these, got {window!r}"
    )
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2:
        raise ValueError(wrong)
    for side in sides:
        if side is not None and not _is_integer(side):
            raise TypeError(wrong)
        if side is not None and side < 0:
            raise ValueError(wrong)
    left, right = (None if side is None else int(side) for side in sides)
    return left, right


def integer(name: str, value: int, at_least: int) -> int:
    """`value` as an int, if it is one and not below `at_least`."""
    wrong = f"{name} must be an integer >= {at_least}, got {value!r}"
    if not _is_integer(value):
        raise TypeError(wrong)
    if value < at_least:
        raise ValueError(wrong)
    return int(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _finite(name: str, value: float, *, positive: bool = False) -> float:
    wrong = f"{name} must be None or a finite number{' > 0' if positive else ''}, got {value!r}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(wrong)
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(wrong)
    return float(value)


def bind(name: str, given: npt.ArrayLike, layout: str, sizes: dict[str, int]) -> Array:
    """`given` in float64 if its shape fits `layout`; sizes not known before become known."""
    array = np.asarray(given)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    symbols = layout.split()
    if array.ndim != len(symbols) or any(
        sizes.get(symbol, size) != size for symbol, size in zip(symbols, array.shape, strict=True)
    ):
        allowed = ", ".join(
            f"{symbol}={sizes[symbol]}" if symbol in sizes else symbol for symbol in symbols
        )
        raise ValueError(f"{name} has shape {array.shape}, it must be ({allowed})")
    for symbol, size in zip(symbols, array.shape, strict=True):
        if size == 0 and symbol not in MAY_BE_ZERO:
            raise ValueError(f"{name} has shape {array.shape}, {symbol} must be at least 1")
        sizes[symbol] = size
    return array.astype(np.float64)


def read_depth(k_depth: Depth, v_depth: Depth, sizes: dict[str, int]) -> tuple[Array, Array]:
    """Both depths packed, if they fit each other and `sizes`; without depth L = 0."""
    if k_depth is None and v_depth is None:
        k_depth = v_depth = []
    if k_depth is None or v_depth is None:
        missing, other = ("k_depth", "v_depth") if k_depth is None else ("v_depth", "k_depth")
        raise ValueError(f"{missing} is None, but {other} is given; give both or neither")
    k_packed = _pack("k_depth", k_depth, "D", sizes)
    v_packed = _pack("v_depth", v_depth, "DV", sizes)
    if k_packed.shape[2] != v_packed.shape[2]:
        raise ValueError(
            f"k_depth has {k_packed.shape[2]} slots and v_depth has {v_packed.shape[2]}; "
            "they must have equally many"
        )
    return k_packed, v_packed


def _pack(
    name: str, given: Sequence[npt.ArrayLike] | npt.ArrayLike, width: str, sizes: dict[str, int]
) -> Array:
    """One (B, T, L, H, width) array from a list of slots or from a packed array."""
    if not isinstance(given, Sequence):
        return bind(name, given, f"B T L H {width}", dict(sizes))
    slots = [bind(f"{name}[{l}]", slot, f"B T H {width}", sizes) for l, slot in enumerate(given)]
    if not slots:
        return np.zeros((sizes["B"], sizes["T"], 0, sizes["H"], sizes[width]))
    return np.stack(slots, axis=2)
