"""Keys or values of depth in the form in which operators take them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class SlotTensors(NamedTuple):
    """L slots (.., H, D), or a list of one packed tensor (.., L, H, D).

    Example:
        >>> import torch
        >>> SlotTensors.of([torch.zeros(2, 5, 3, 1, 8)]).number
        3
        >>> SlotTensors.of([torch.zeros(2, 5, 1, 8)] * 4).number
        4
    """

    tensors: list[Tensor]
    packed: bool

    @classmethod
    def of(cls, tensors: list[Tensor], axes: int = 2) -> "SlotTensors":
        """``axes`` is how many stand before the heads: batch and tokens, or tokens alone."""
        return cls(tensors, len(tensors) == 1 and tensors[0].dim() == axes + 3)

    @property
    def number(self) -> int:
        """L."""
        return self.tensors[0].shape[-3] if self.packed else len(self.tensors)

    def each(self) -> Sequence[Tensor]:
        """A view of every slot."""
        return self.tensors[0].unbind(-3) if self.packed else self.tensors

    def __str__(self) -> str:
        if self.packed:
            return f"one packed tensor of shape {tuple(self.tensors[0].shape)}"
        return f"a list of length {len(self.tensors)}"
