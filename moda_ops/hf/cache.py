"""The cache that ``generate`` of transformers passes around."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache

from moda_ops import nn
from moda_ops.hf.config import MoDAConfig
from moda_ops.rules.autocast import compute_dtype


class MoDACache(Cache):
    """A :class:`moda_ops.nn.KVCache` that ``generate`` can pass around and that grows.

    ``generate`` makes one with room for the whole text; one that a forward pass makes has room for
    its tokens and doubles when it is full. A text's tokens lie from position 0 on, wherever its
    padding is. Memory is allocated in the first forward pass, which knows dtype and device.

    Args:
        config: of the model.
        batch: B.
        capacity: columns, tokens with padding, until it has to grow; at least 1.

    Attributes:
        capacity: columns that it has room for.
        columns: those so far.
        kv: keys, values, and how many tokens each text has; None before the first forward pass.

    Example:
        >>> from moda_ops.hf import MoDACache, MoDAConfig, MoDAForCausalLM
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model, cache = MoDAForCausalLM(config).eval(), MoDACache(config, 1, capacity=100)
        >>> tokens = model.generate(
        ...     torch.tensor([[1, 2, 3]]), max_new_tokens=5, cache=cache
        ... )  # before transformers 5.24: past_key_values=cache
        >>> tokens.shape, cache.get_seq_length()
        (torch.Size([1, 8]), 7)
    """

    def __init__(self, config: MoDAConfig, batch: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.config = config.to_nn()
        self._texts, self.capacity, self.columns = batch, capacity, 0
        self.kv: nn.KVCache | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} layers of {self.batch_size} texts, "
            f"{self.columns} of {self.capacity} columns)"
        )

    def __len__(self) -> int:
        return self.config.layers

    @property
    def batch_size(self) -> int:
        """B."""
        return self._texts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far: the tokens of the longest text, its padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def reserve(self, columns: int, x: Tensor) -> nn.KVCache:
        """The memory, with room for so many columns, of a model whose embedding returns x."""
        room, self.capacity = self.capacity, max(columns, self.capacity)
        if self.kv is None:
            self.kv = nn.KVCache.allocate(
                self.config,
                self.batch_size,
                self.capacity,
                dtype=compute_dtype(x.dtype, x.device),
                device=x.device,
            )
        elif columns > room:
            self.capacity = max(columns, 2 * room)
            self._map(
                lambda x: torch.cat((x, x.new_empty(len(x), self.capacity - room, *x.shape[2:])), 1)
            )
        return self.kv

    def append(self, columns: int, tokens: Tensor | int) -> None:
        """Count columns that the layers have filled, and each text's tokens among them."""
        assert self.kv is not None
        self.columns += columns
        self.kv.lengths.add_(tokens)

    def reset(self) -> None:
        """Forget all tokens."""
        self.columns, self.kv = 0, None

    def crop(self, columns: int) -> None:
        """Take the last tokens, none of them padding, from every text.

        Args:
            columns: below 0 how many go, above 0 how many columns stay: assisted generation gives
                the first since transformers 5.17 or before, the second in older ones.
        """
        if columns > 0:
            columns = min(columns - self.columns, 0)
        self.append(columns, columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace text b by text ``beam_idx[b]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts, in this order."""
        self._texts = len(indices)
        self._map(lambda x: x[indices.to(x.device)])
        if self.kv is not None:
            lengths = self.kv.lengths
            self.kv = self.kv._replace(lengths=lengths[indices.to(lengths.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every text so many times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.kv is not None:
            k, v = (tuple(map(function, tensors)) for tensors in (self.kv.k, self.kv.v))
            self.kv = self.kv._replace(k=k, v=v)
