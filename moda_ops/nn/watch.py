"""A stream that shows every read of it: what :mod:`moda_ops.nn.inspection` stands on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from moda_ops.operators.attention import moda_attention
from moda_ops.stream.protocol import ReadableStream


class Reading(NamedTuple):
    """One attention call, as a :class:`WatchedStream` shows it; tensors without gradient.

    Attributes:
        layer: how many calls were before it: the block, from 0; under ``depth="attention"`` a block
            makes three calls, for its sequence and twice for depth.
        q: (B, T, HQ, D).
        k: the sequence's keys, (B, S, H, D); None where depth alone is read.
        k_depth: the depth keys that were read, each (B, T, H, D).
        slots: the numbers of these slots, in the order they were written.
        lse: (B, HQ, T), of the softmax over all of them.
        options: what the layer gave beside tensors: ``causal``, ``window`` and the like.
    """

    layer: int
    q: Tensor
    k: Tensor | None
    k_depth: list[Tensor]
    slots: tuple[int, ...]
    lse: Tensor
    options: dict[str, Any]


class WatchedStream(NamedTuple):
    """A stream that shows every read of it: to layers it is what the stream in it is.

    Attributes:
        stream: the stream that does the work.
        observe: called with a :class:`Reading` after every attention call.
        slots: the numbers of the slots that are there.
        end: how many slots were written in all.
        layer: attention calls so far.

    Example:
        >>> import torch
        >>> from moda_ops.nn import DepthUse, MoDAConfig, MoDALanguageModel
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model, tokens = MoDALanguageModel(config), torch.randint(256, (2, 16))
        >>> uses = []  # logged beside a training step
        >>> stream = WatchedStream(model.stream(2, 16), lambda r: uses.append(DepthUse.of(r)))
        >>> model(tokens, stream).sum().backward()
        >>> [use.slots for use in uses]
        [(), (0, 1), (0, 1, 2, 3)]
    """

    stream: ReadableStream
    observe: Callable[[Reading], object]
    slots: tuple[int, ...] = ()
    end: int = 0
    layer: int = 0

    @property
    def written(self) -> int:
        """How many slots are written, and not dropped."""
        return self.stream.written

    def write(self, k: Tensor, v: Tensor) -> "WatchedStream":
        """See :meth:`moda_ops.DepthStream.write`."""
        slots, stream = (*self.slots, self.end), self.stream.write(k, v)
        return self._replace(stream=stream, slots=slots, end=self.end + 1)

    def keep(self, slots: Sequence[int]) -> "WatchedStream":
        """See :meth:`moda_ops.DepthStream.keep`."""
        stream = self.stream.keep(slots)
        return self._replace(stream=stream, slots=tuple(self.slots[i] for i in slots))

    def attend(
        self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options: Any
    ) -> "tuple[Tensor, WatchedStream]":
        """See :meth:`moda_ops.DepthStream.attend`."""
        out, lse, stream = self.stream.attend_with_lse(q, k, v, **options)
        keys, slots = self.stream.keys(), self.slots
        if k is None:
            k, keys, slots = keys[-1], keys[:-1], slots[:-1]
        self._show(q, k, keys, slots, lse, options)
        return out, self._replace(stream=stream, layer=self.layer + 1)

    def attend_sequence(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> "tuple[Tensor, WatchedStream]":
        """See :meth:`moda_ops.DepthStream.attend_sequence`."""
        out, lse = moda_attention(q, k, v, [], [], **options, return_lse=True)
        self._show(q, k, [], (), lse, options)
        return out, self._replace(layer=self.layer + 1)

    def attend_depth(self, q: Tensor, **options: Any) -> "tuple[Tensor, WatchedStream]":
        """See :meth:`moda_ops.DepthStream.attend_depth`."""
        keys = self.stream.keys()
        B, _, H, D = keys[0].shape
        k, v = q.new_empty(B, 0, H, D), q.new_empty(B, 0, H, self.stream.value_dim)
        out, lse, stream = self.stream.attend_with_lse(q, k, v, causal=False, **options)
        self._show(q, None, keys, self.slots, lse, options)
        return out, self._replace(stream=stream, layer=self.layer + 1)

    def _show(
        self,
        q: Tensor,
        k: Tensor | None,
        k_depth: list[Tensor],
        slots: tuple[int, ...],
        lse: Tensor,
        options: dict[str, Any],
    ) -> None:
        k = None if k is None else k.detach()
        depth = [key.detach() for key in k_depth]
        self.observe(Reading(self.layer, q.detach(), k, depth, slots, lse.detach(), options))
