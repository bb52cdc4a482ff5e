"""Which checkpoint runs this code: one that recomputes a block, or one that will do so later.

A stream's slot may be written a second time only where a block is recomputed. PyTorch does not
say whether it recomputes, so this module looks for its functions on the call stack. Streams look
when a slot is written again, and when gradients are disabled: at allocation, which compiled code
always runs so, and in eager code at each write. An eager training step without checkpoints never
looks.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Literal

from torch.autograd.function import BackwardCFunction, Function

REENTRANT = (
    "a depth stream loses gradients in a reentrant checkpoint, which runs a block without "
    "gradients and does not see the tensors inside a stream: call torch.utils.checkpoint."
    "checkpoint(..., use_reentrant=False)"
)

_BACKWARD = {
    getattr(BackwardCFunction, name).__code__
    for name in ("apply", "apply_boxed")
    if hasattr(BackwardCFunction, name)
}
_FORWARD = Function.apply.__code__


def _compiled(function: type) -> bool:
    return function.__module__.startswith("torch._functorch")


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def recomputation() -> Literal["checkpoint", "compiled", "reentrant"] | None:
    """Which kind of recomputation runs this code; None if none does.

    ``"reentrant"`` is any autograd.Function whose backward runs a block again:
    ``torch.utils.checkpoint``'s of that name, and those of other libraries.
    """
    for frame in _stack():
        module = frame.f_globals.get("__name__")
        if module == "torch.utils.checkpoint" and frame.f_code.co_name == "unpack_hook":
            return "checkpoint"
        if module == "torch._dynamo.compiled_autograd":
            return "compiled"
        if frame.f_code in _BACKWARD:
            function = type(frame.f_locals["self"])._forward_cls
            return "compiled" if _compiled(function) else "reentrant"
    return None


def in_reentrant_forward() -> bool:
    """Whether a reentrant checkpoint runs this code for the first time, without gradients.

    True in the forward of any autograd.Function, which PyTorch runs without gradients, except
    those that compiled code is made of.
    """
    return any(
        frame.f_code is _FORWARD and not _compiled(frame.f_locals["cls"]) for frame in _stack()
    )
