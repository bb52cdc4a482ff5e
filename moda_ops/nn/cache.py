"""What a model keeps between the tokens of a text: keys and values of its sequence, none of depth.

Only the layers above read a token's depth keys, at the token itself. So these live as long as the
token passes the layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moda_ops.nn.config import BlockConfig
from moda_ops.operators.attention import moda_attention
from moda_ops.operators.checks import check_both
from moda_ops.operators.decode import moda_decode
from moda_ops.stream.checks import EMPTY_STREAM
from moda_ops.stream.depth_slots import DepthSlots


class KVCache(NamedTuple):
    """Sequence keys and values of every attention layer, written in place.

    Allocated once for a batch of texts; its tensors never move, so that a captured CUDA graph may
    write to them. Both take 2 * layers * B * capacity * H * D elements in all, whatever ``depth``.

    Attributes:
        k: keys (B, capacity, H, D) of each layer, rotated. Positions not written hold anything.
        v: values (B, capacity, H, D) of each layer.
        lengths: (B,) int32, tokens of each text so far.

    Example:
        >>> config = BlockConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> cache = KVCache.allocate(config, batch=3, capacity=100)
        >>> len(cache.k), cache.k[0].shape, cache.lengths
        (2, torch.Size([3, 100, 2, 8]), tensor([0, 0, 0], dtype=torch.int32))
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    lengths: Tensor

    @classmethod
    def allocate(
        cls,
        config: BlockConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "KVCache":
        """A cache of empty texts.

        Args:
            config: of the model.
            batch: B.
            capacity: tokens that a text can have.
            dtype: of keys and values, as the model computes them; default: PyTorch's default dtype.
            device: default: PyTorch's default device.
        """
        shape = batch, capacity, config.kv_heads, config.head_dim
        k, v = (
            tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(config.layers))
            for _ in range(2)
        )
        return cls(k, v, torch.zeros(batch, dtype=torch.int32, device=device))


class CachedStream(NamedTuple):
    """The stream of tokens that pass the layers of a model that serves.

    To the layers it is what :class:`moda_ops.DepthSlots` is. Depth slots are those of the tokens at
    hand and go when the stream goes. An attention layer's keys and values join its part of the
    cache, which is then the sequence. There is no gradient, and attention is causal.

    Attributes:
        cache: of all layers; its ``lengths`` are not changed.
        start: the position of the first of the tokens, if it is one number for all texts, as in a
            prompt; None if it is each text's length, as in generation.
        slots: what the layers have written so far.
        layer: attention layers so far.

    Example:
        >>> config = BlockConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> cache = KVCache.allocate(config, batch=1, capacity=8)
        >>> q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8)
        >>> stream = CachedStream(cache, start=0)
        >>> for layer in range(2):
        ...     out, stream = stream.write(k, k).attend(q)
        >>> torch.equal(cache.k[1][:, :3], k), stream.written
        (True, 2)
    """

    cache: KVCache
    start: int | None = None
    slots: DepthSlots = DepthSlots()
    layer: int = 0

    @property
    def written(self) -> int:
        """How many depth slots are written."""
        return self.slots.written

    def write(self, k: Tensor, v: Tensor) -> "CachedStream":
        """The stream with one more depth slot: k and v (B, N, H, D) of the N tokens at hand."""
        return CachedStream(self.cache, self.start, self.slots.write(k, v), self.layer)

    def keep(self, slots: Sequence[int]) -> "CachedStream":
        """The stream without all other depth slots; see :meth:`moda_ops.DepthStream.keep`."""
        return CachedStream(self.cache, self.start, self.slots.keep(slots), self.layer)

    def attend(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> "tuple[Tensor, CachedStream]":
        """``out`` (B, N, HQ, D) over the layer's cache, k and v included, and the slots.

        If k and v are None, they are the newest slot, and depth are the slots before it. Raises
        what :func:`moda_ops.moda_decode` and :func:`moda_ops.moda_attention` raise.
        """
        _check_causal(causal)
        check_both("k", k, "v", v)
        k_depth, v_depth = list(self.slots.k), list(self.slots.v)
        if k is None or v is None:
            if not k_depth:
                raise ValueError(EMPTY_STREAM)
            k, v = k_depth.pop(), v_depth.pop()
        return self._attend(q, k, v, k_depth, v_depth)

    def attend_sequence(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True
    ) -> "tuple[Tensor, CachedStream]":
        """The same without depth: see :meth:`moda_ops.DepthStream.attend_sequence`."""
        _check_causal(causal)
        return self._attend(q, k, v, [], [])

    def attend_depth(self, q: Tensor) -> "tuple[Tensor, CachedStream]":
        """Over the slots alone: see :meth:`moda_ops.DepthStream.attend_depth`."""
        return self.slots.attend_depth(q)[0], self

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_depth: list[Tensor], v_depth: list[Tensor]
    ) -> "tuple[Tensor, CachedStream]":
        k_cache, v_cache = self.cache.k[self.layer], self.cache.v[self.layer]
        after = CachedStream(self.cache, self.start, self.slots, self.layer + 1)
        if self.start is None:
            lengths = self.cache.lengths
            out = moda_decode(q, k_cache, v_cache, k_depth, v_depth, lengths, k_new=k, v_new=v)
            return out, after
        end = self.start + q.shape[1]
        k_cache[:, self.start : end], v_cache[:, self.start : end] = k, v
        return moda_attention(q, k_cache[:, :end], v_cache[:, :end], k_depth, v_depth), after


def _check_causal(causal: bool) -> None:
    if not causal:
        raise ValueError(
            "causal must be True with a cache: keys that are not yet there cannot be attended to"
        )
