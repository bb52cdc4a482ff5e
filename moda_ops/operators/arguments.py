"""What public functions do with their arguments before an operator sees them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moda_ops.operators.checks import check_both

DepthArgument = Sequence[Tensor] | Tensor
"""L slots, or one packed tensor."""
Window = int | tuple[int | None, int | None]


def check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_bool(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, torch.SymBool):
        return bool(value)  # a mask is one or the other: a compiler guards on it
    raise TypeError(f"{name} must be a bool, got {_repr(value)}")


def check_int(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {_repr(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    _check_64_bits(name, value)
    return value  # type: ignore[return-value]


def _check_64_bits(name: str, value: object) -> None:
    """What PyTorch's operators take for an int."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits if it is an int, got {value}")


def check_option(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or None, got {_repr(value)}")
    _check_64_bits(name, value)


def _repr(value: object) -> str:
    """Of an argument that should be a Python number; NumPy's and tensors can become one."""
    return f"{value!r}; call .item()" if hasattr(value, "item") else repr(value)


def check_plan(value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"plan must be a string, got {value!r}")


def slot_lists(
    k_depth: DepthArgument | None, v_depth: DepthArgument | None, tokens: str = "B, T"
) -> tuple[list[Tensor], list[Tensor]]:
    """The operators' form of depth: L slots, or a list of one packed tensor.

    ``tokens`` is how errors call the axes before the heads.
    """
    check_both("k_depth", k_depth, "v_depth", v_depth)
    return _slot_list("k_depth", k_depth, tokens), _slot_list("v_depth", v_depth, tokens)


def _slot_list(name: str, depth: DepthArgument | None, tokens: str) -> list[Tensor]:
    slot, packed = f"({tokens}, H, D)", f"({tokens}, L, H, D)"
    rank = len(slot.split(","))
    if depth is None:
        return []
    if isinstance(depth, Tensor):
        if depth.dim() != rank + 1:
            raise ValueError(
                f"{name} given as one tensor must be packed, {packed}, got "
                f"{depth.dim()} dimensions {tuple(depth.shape)}; a single slot goes in a list"
            )
        return [depth]
    if not isinstance(depth, (list, tuple)):
        raise TypeError(
            f"{name} must be a list of tensors {slot} or one packed tensor {packed}, "
            f"got {type(depth).__name__}"
        )
    for i, x in enumerate(depth):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != rank:
            raise ValueError(
                f"{name}[{i}] must be {slot}, got {x.dim()} dimensions "
                f"{tuple(x.shape)}; a packed tensor is given by itself, not in a list"
            )
    return list(depth)


def window_sides(window: Window | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = (window, window) if isinstance(window, (int, torch.SymInt)) else window
    if not isinstance(sides, tuple) or len(sides) != 2:
        raise TypeError(
            f"window must be None, an int or a tuple (left, right), got {_repr(window)}"
        )
    for side in sides:
        if isinstance(side, bool) or not (side is None or isinstance(side, (int, torch.SymInt))):
            raise TypeError(f"window sides must be ints or None, got {_repr(side)}")
        if side is not None and side < 0:
            raise ValueError(f"window sides must be >= 0 (None is unbounded), got {window!r}")
        _check_64_bits("a window side", side)
    return sides


def score_options(scale: float | None, softcap: float | None) -> dict[str, Any]:
    """What becomes of scores, as operators take it."""
    check_option("scale", scale)
    check_option("softcap", softcap)
    return dict(scale=scale, softcap=softcap)


def attention_options(
    causal: bool, scale: float | None, window: Window | None, softcap: float | None, plan: str
) -> dict[str, Any]:
    """All options of :func:`moda_attention`, as operators take them."""
    check_option("scale", scale)
    check_option("softcap", softcap)
    check_plan(plan)
    causal, (left, right) = check_bool("causal", causal), window_sides(window)
    return dict(
        causal=causal,
        scale=scale,
        window_left=left,
        window_right=right,
        softcap=softcap,
        plan=plan,
    )
