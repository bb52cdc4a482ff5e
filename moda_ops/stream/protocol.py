"""What layers ask of a depth stream, whatever form it has."""

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

from torch import Tensor


class Stream(Protocol):
    """Any form of the depth stream: a value with the slots that the layers so far have written.

    Each method returns the stream to pass on. Your own stream needs no base class, only these
    methods; attention methods may take further options. :class:`moda_ops.DepthStream` explains
    each.

    Example:
        >>> import torch
        >>> from moda_ops import DepthSlots
        >>> from moda_ops.nn import Stream
        >>> def layer(x: Tensor, stream: Stream) -> tuple[Tensor, Stream]:
        ...     return stream.write(x, x).attend(x)
        >>> x, stream = layer(torch.randn(1, 3, 2, 8), DepthSlots())
        >>> stream.written
        1
    """

    @property
    def written(self) -> int:
        """How many slots are written, and not dropped."""

    def write(self, k: Tensor, v: Tensor) -> Self:
        """The stream with one more slot: k (B, T, H, D) and v (B, T, H, DV)."""

    def keep(self, slots: Sequence[int]) -> Self:
        """The stream without all other slots."""

    def attend(
        self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, causal: bool = True
    ) -> tuple[Tensor, Self]:
        """``out`` (B, T, HQ, DV) of the sequence and the slots, under one softmax.

        If k and v are None, the newest slot is the sequence, and depth are the slots before it.
        """

    def attend_sequence(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True
    ) -> tuple[Tensor, Self]:
        """``out`` (B, T, HQ, DV) of the sequence alone."""

    def attend_depth(self, q: Tensor) -> tuple[Tensor, Self]:
        """``out`` (B, T, HQ, DV) of the slots alone."""


class ReadableStream(Stream, Protocol):
    """A stream that shows what it holds: what a :class:`moda_ops.nn.WatchedStream` can watch."""

    @property
    def value_dim(self) -> int:
        """DV, of values."""

    def keys(self) -> list[Tensor]:
        """The keys (B, T, H, D) of every slot that is there."""

    def attend_with_lse(
        self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, causal: bool = True
    ) -> tuple[Tensor, Tensor, Self]:
        """What ``attend`` returns, with ``lse`` (B, HQ, T) before the stream."""


StreamT = TypeVar("StreamT", bound=Stream)
"""A layer returns a stream of the kind that it was given."""
