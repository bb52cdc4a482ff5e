"""A launch that is prepared once: all of a kernel's arguments but its pointers.

Triton inspects every argument of every launch to find the compiled code, which takes longer than the
launch itself. A ``Launch`` lets it do so once. That is sound as long as all calls of a ``Launch`` agree
in what Triton inspects: the device, and the pointers' dtypes and whether they are multiples of 16. Each
pass keeps its launches by ``Problem`` and ``Layout``, which say that and more.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Sizes and options of a call: q (B, T, G H, D), k (B, S, H, D), v (B, S, H, DV), L slots.

    A ``chunk`` is the number of tokens that share their depth, at most T; None is a token for itself.
    """

    B: int
    T: int
    S: int
    L: int
    H: int
    G: int
    D: int
    DV: int
    scale: float
    left: int | None
    right: int | None
    softcap: float | None
    varlen: bool = False  # packed documents: B = 1, and ``bands`` say who sees whom
    chunk: int | None = None

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def flops(self) -> float:
        """Floating-point operations of the sequence's products in forward."""
        rows = self.B * self.T * self.H * self.G
        return 2.0 * rows * self.S * (self.D + self.DV) / (2 if self.causal else 1)


class Layout(NamedTuple):
    """What of a tensor a launch is prepared for."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    misalignment: int  # bytes past the last multiple of 16


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the lse beside inputs of this dtype: 16-bit ones do not notice what float32 rounds off a large one."""
    return torch.float64 if dtype is torch.float32 else torch.float32


def layout(x: Tensor | None) -> Layout | None:
    return None if x is None else Layout(x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16)


class Launch:
    """``programs`` programs of a kernel whose parameters are pointers, then ``arguments``, then constants.

    ``constants`` are its constexpr parameters, by name, and the compiler's options.
    """

    def __init__(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        self._grid = programs, 1, 1
        self._first = kernel[self._grid]
        self._arguments, self._constants = arguments, constants
        self._placeholders = (None,) * sum(name in constants for name in kernel.arg_names)
        self._compiled: Any = None

    def __call__(self, *pointers: Any) -> None:
        if self._compiled is None:  # as it stays under the interpreter
            self._compiled = self._first(*pointers, *self._arguments, **self._constants)
        else:
            self._compiled[self._grid](*pointers, *self._arguments, *self._placeholders)


cached_launch: Callable[[Callable[..., Launch]], Callable[..., Launch]] = lru_cache(maxsize=4096)
"""Keeps what a function prepares. A model of 48 layers has up to 96 problems for each length and batch."""
