"""How others keep a depth stream, for comparison: every layer stacks all earlier slots again."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops import moda_attention


class StackedSlots(NamedTuple):
    """A list of slots like :class:`moda_ops.DepthSlots`, but each read copies it into one tensor.

    Layer l keeps its own copy of l slots for backward, O(L^2) in all.

    Attributes:
        k: keys (B, T, H, D) of each slot.
        v: values (B, T, H, DV) of each slot.
    """

    k: tuple[Tensor, ...] = ()
    v: tuple[Tensor, ...] = ()
    attention = staticmethod(moda_attention)

    @property
    def written(self) -> int:
        """How many slots are written."""
        return len(self.k)

    def write(self, k: Tensor, v: Tensor) -> "StackedSlots":
        """The stream with one more slot: k (B, T, H, D) and v (B, T, H, DV)."""
        return type(self)((*self.k, k), (*self.v, v))

    def attend(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        **options: Any,
    ) -> "tuple[Tensor, StackedSlots]":
        """``out`` (B, T, HQ, DV) and the stream; see :meth:`moda_ops.DepthStream.attend`."""
        k_slots, v_slots = list(self.k), list(self.v)
        if k is None or v is None:
            k, v = k_slots.pop(), v_slots.pop()
        k_depth = torch.stack(k_slots, 2) if k_slots else None  # (B, T, L, H, D)
        v_depth = torch.stack(v_slots, 2) if v_slots else None
        return self.attention(q, k, v, k_depth, v_depth, **options), self
