"""The blocks, what every model has, and the language model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moda_ops.nn.config import BlockConfig, MoDAConfig
from moda_ops.nn.layers import (
    DepthAttention,
    DepthProjection,
    FeedForward,
    MoDAAttention,
    RMSNorm,
    Rotary,
    TokenEmbedding,
    check_tokens,
    output_layer,
    rotary_angles,
)
from moda_ops.stream.depth_slots import DepthSlots
from moda_ops.stream.depth_stream import DepthStream
from moda_ops.stream.protocol import Stream, StreamT

if TYPE_CHECKING:
    from moda_ops.nn.context_parallel import ContextParallel


class MoDABlock(nn.Module):
    """Attention and feed-forward around the residual stream, and what they write to depth.

    Each is ``x = norm(x + f(x))`` (post-norm) or ``x = x + f(norm(x))`` (pre-norm). A projection
    writes what its layer takes in: in pre-norm the normalized x.

    Args:
        config: ``depth`` is any but ``"attention"``.
        last: whether no block follows. It then writes nothing, unless ``config.write_last``.

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> block, rotary = MoDABlock(config, last=False), rotary_angles(torch.arange(5), 8, 1e4)
        >>> x, stream = block(torch.randn(1, 5, 32), rotary, DepthSlots())
        >>> x.shape, stream.written
        (torch.Size([1, 5, 32]), 2)
    """

    def __init__(self, config: BlockConfig, *, last: bool) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.continues = config.write_last or not last  # somebody takes the stream
        self.writes = self.continues and config.depth != "residual"
        projects = config.depth.split("+") if self.writes else []
        self.attention = MoDAAttention(config)
        self.attention_norm = RMSNorm(config.width)
        self.attention_write = DepthProjection(config) if "attn" in projects else None
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward_write = DepthProjection(config) if "ffn" in projects else None

    def forward(self, x: Tensor, rotary: Rotary | None, stream: StreamT) -> tuple[Tensor, StreamT]:
        """Output (B, T, C) for x (B, T, C), and the stream with this block's slots appended."""
        h = self.attention_norm(x) if self.pre_norm else x
        write_keys = self.writes and self.attention_write is None
        y, read = self.attention(h, rotary, stream, write=write_keys)
        # If no block continues a stream, a compiled block would get zeros as its gradient.
        stream = read if self.continues else stream
        x = x + y if self.pre_norm else self.attention_norm(x + y)
        if self.attention_write is not None:
            stream = stream.write(*self.attention_write(h, rotary))

        h = self.feed_forward_norm(x) if self.pre_norm else x
        if self.feed_forward_write is not None:
            stream = stream.write(*self.feed_forward_write(h, rotary))
        y = self.feed_forward(h)
        return x + y if self.pre_norm else self.feed_forward_norm(x + y), stream


class DepthAttentionBlock(nn.Module):
    """Attention and feed-forward, each followed by :class:`DepthAttention` in place of a sum.

    A layer's output is ``norm(f(x))`` (post-norm) or ``f(norm(x))`` (pre-norm). The sequence
    attention is plain attention.

    Args:
        config: ``depth`` is ``"attention"``.

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64,
        ...     depth="attention",
        ... )
        >>> block, rotary = DepthAttentionBlock(config), rotary_angles(torch.arange(5), 8, 1e4)
        >>> x, stream = block(torch.randn(1, 5, 32), rotary, DepthSlots())
        >>> x.shape, stream.written
        (torch.Size([1, 5, 32]), 2)
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = MoDAAttention(config)
        self.attention_norm = RMSNorm(config.width)
        self.attention_depth = DepthAttention(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward_depth = DepthAttention(config)

    def forward(self, x: Tensor, rotary: Rotary | None, stream: StreamT) -> tuple[Tensor, StreamT]:
        """The next block's input (B, T, C) for x (B, T, C), and the stream with two more slots."""
        h = self.attention_norm(x) if self.pre_norm else x
        y, stream = self.attention(h, rotary, stream, write=False, read=False)
        y = y if self.pre_norm else self.attention_norm(y)
        x, stream = self.attention_depth(y, rotary, stream)

        y = self.feed_forward(self.feed_forward_norm(x) if self.pre_norm else x)
        y = y if self.pre_norm else self.feed_forward_norm(y)
        return self.feed_forward_depth(y, rotary, stream)


RunBlock = Callable[..., Any]
"""Calls ``block(x, rotary, stream)``, given these four, in a way of its own."""


class MoDATransformer(nn.Module):
    """What every model has: an embedding, blocks, and the depth stream that they pass on.

    By default (``depth="kv+ffn"``) block l, from 0, reads 2 l depth slots, two from each block
    before it. Under ``depth="attention"`` the embedding is written too, normalized, for it would
    vanish beside the layers' outputs; the first block's input is attention over this one slot,
    that is, its value repeated for every head of a group.

    Args:
        config: of the blocks.
        embedding: makes x (B, T, C) of what the model takes in.

    Example:
        >>> config = BlockConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64, causal=False
        ... )
        >>> encoder = MoDATransformer(config, nn.Linear(7, 32))
        >>> x = encoder.embedding(torch.randn(1, 5, 7))
        >>> encoder.hidden(x, None, encoder.stream(1, 5)).shape  # no rotation: rotary is None
        torch.Size([1, 5, 32])
    """

    config: BlockConfig
    embedding: nn.Module

    def __init__(self, config: BlockConfig, embedding: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.kv_heads = config.kv_heads  # that this process has: tensor parallelism divides them
        self.kept_positions = config.depth_positions()
        self.embedding = embedding
        depth_attention = config.depth == "attention"
        self.embedding_norm = RMSNorm(config.width, gain=False) if depth_attention else None
        self.embedding_write = DepthProjection(config) if depth_attention else None
        self.blocks = nn.ModuleList(
            DepthAttentionBlock(config)
            if depth_attention
            else MoDABlock(config, last=i == config.layers - 1)
            for i in range(config.layers)
        )
        self.norm = RMSNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights with standard deviation 0.02 (embedding) and 1/sqrt(fan-in) (matrices).

        The 2 * layers matrices that write to the residual stream get 1/sqrt(2 * layers) of that
        (Radford et al. 2019, section 2.3). Biases are 0, gains 1.
        """
        for name, module in self.named_modules():
            self.reset_module(name, module)

    @torch.no_grad()
    def reset_module(self, name: str, module: nn.Module) -> None:
        """The same for the parameters of one module, without those of its children."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            sums = 1 if self.config.depth == "attention" else 2 * self.config.layers
            fan_in = module.in_features * (sums if name.endswith("out_proj") else 1)
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            module.reset_parameters()

    def num_parameters(self) -> int:
        """Parameters, an embedding that is also the output layer counted once."""
        return sum(p.numel() for p in self.parameters())

    def stream(
        self, batch: int, tokens: int, *, like: Tensor | None = None
    ) -> DepthSlots | DepthStream:
        """The empty stream of a forward pass, as large as the blocks will fill it.

        Of a bounded model without gradients it is a list of slots, which frees the dropped ones.

        Args:
            batch: B.
            tokens: T.
            like: the first block's input, which tells the dtype and the device; default: the
                embedding's parameters.
        """
        slots = self.config.depth_slots()
        bounded = self.config.depth_keep is not None
        if slots == 0 or (bounded and not torch.is_grad_enabled()):
            return DepthSlots()
        like = next(self.embedding.parameters()) if like is None else like
        return self._allocate(batch, tokens, like)

    def _allocate(self, batch: int, tokens: int, like: Tensor) -> DepthStream:
        shape = self.config.depth_slots(), batch, tokens, self.kv_heads, self.config.head_dim
        return allocate_stream(*shape, like=like)

    def hidden(
        self,
        x: Tensor,
        rotary: Rotary | None,
        stream: Stream,
        *,
        run_block: RunBlock | None = None,
    ) -> Tensor:
        """What the output layer takes, (B, T, C).

        Args:
            x: (B, T, C), embedded.
            rotary: angles of the tokens; None rotates nothing.
            stream: an empty one. ValueError if it has slots.
            run_block: calls a block in place of ``block(x, rotary, stream)``, as
                ``torch.utils.checkpoint.checkpoint`` (with ``use_reentrant=False``) does.
        """
        if stream.written:
            raise ValueError(
                f"stream must be empty before the first block, got {stream.written} written slots"
            )
        if self.embedding_norm is not None and self.embedding_write is not None:
            k, v = self.embedding_write(self.embedding_norm(x), rotary)
            x = v.repeat_interleave(self.config.heads // v.shape[2], 2).flatten(2)
            stream = stream.write(k, v)
            del k, v  # or a bounded stream could not free the slot
        for block, kept in zip(self.blocks, self.kept_positions, strict=True):
            if kept is not None:
                stream = stream.keep(kept)
            if run_block is None:
                x, stream = block(x, rotary, stream)
            else:
                x, stream = run_block(block, x, rotary, stream)
        return self.norm(x)


class MoDALanguageModel(MoDATransformer):
    """A language model; its output layer is the transposed embedding.

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model = MoDALanguageModel(config)
        >>> model(torch.randint(256, (1, 5))).shape
        torch.Size([1, 5, 256])
    """

    config: MoDAConfig
    embedding: nn.Embedding

    def __init__(self, config: MoDAConfig) -> None:
        super().__init__(config, TokenEmbedding(config.vocab_size, config.width))

    def num_parameters(self) -> int:
        """Parameters, the embedding counted once.

        These are the counts of arXiv 2603.15619, Tables 3 and 6, to the digits printed there.
        Table 3: 100,278 tokens, width 1024, 16 and 8 heads of 64, hidden 4096. Table 6 gives fewer
        sizes; 50,304 tokens, width 384, 6 and 2 heads of 64 and hidden 1536 fit all of its counts
        with ``qk_norm``, ``bias`` and ``write_last``, in post-norm.

        Example:
            >>> config = MoDAConfig(
            ...     vocab_size=100_278, layers=36, width=1024, heads=16, kv_heads=8, head_dim=64,
            ...     hidden=4096,
            ... )
            >>> with torch.device("meta"):
            ...     model = MoDALanguageModel(config)
            >>> f"{model.num_parameters() / 1e6:.1f} M"
            '705.7 M'
        """
        return super().num_parameters()

    def flops(self, batch: int, tokens: int) -> int:
        """Floating-point operations of one forward pass over (batch, tokens).

        Two for each multiply-add of a matrix product, the output layer's included: 2 per token and
        weight, and 4 D per query head and visible key, for the score and the value. A query at
        position t sees t + 1 sequence keys, T (T + 1) / 2 in all (T^2 unless ``config.causal``),
        and its token's depth slots.
        Softmax, norms, rotation, activations, biases and the embedding lookup are left out.

        The FLOPs column of arXiv 2603.15619, Table 3, is 18 to 19% higher and not explained there.
        It fits batch 1, T = 4096, all T^2 pairs counted, masked ones too, and six more operations
        on each pair's score. What depth adds, rows 3 to 5 against row 1, is the same in both.

        Example:
            >>> config = MoDAConfig(
            ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
            ... )
            >>> model = MoDALanguageModel(config)
            >>> weights = 256 * 32 + 2 * (3 * 32 * 32 + 3 * 32 * 64) + 32 * 32
            >>> pairs = 2 * (1 + 2 + 3 + 4 + 5) + 5 * 2  # the second layer reads two slots
            >>> model.flops(1, 5) == 2 * 5 * weights + 4 * 8 * 4 * pairs
            True
        """
        linear = [m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)]
        weights = self.config.vocab_size * self.config.width + sum(linear)
        seen = tokens * (tokens + 1) // 2 if self.config.causal else tokens**2
        sequence = self.config.layers * seen
        pairs = sequence + tokens * sum(self.config.depth_reads())
        return 2 * batch * tokens * weights + 4 * batch * self.config.q_width * pairs

    def rotary(self, tokens: int, *, device: torch.device | None = None) -> Rotary:
        """Angles of positions 0 .. tokens - 1, on the embedding's device unless one is given."""
        device = self.embedding.weight.device if device is None else device
        return self._rotary(torch.arange(tokens, device=device))

    def _rotary(self, positions: Tensor) -> Rotary:
        return rotary_angles(positions, self.config.head_dim, self.config.rope_base)

    def forward(
        self,
        tokens: Tensor,
        stream: Stream | None = None,
        *,
        context: "ContextParallel | None" = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of tokens (B, T).

        Args:
            tokens: (B, T), integer.
            stream: an empty stream; default a :class:`moda_ops.DepthStream` of the right size. Give
                ``DepthSlots()`` for the functional path, or a
                :class:`moda_ops.nn.WatchedStream` of either.
            context: given if tokens are this rank's part of a sequence, as are then the logits; it
                makes the stream.
        """
        check_tokens("tokens", tokens)
        B, T = tokens.shape
        x = self.embedding(tokens)
        if context is not None:
            if stream is not None:
                raise ValueError("stream must be None if context is given, which makes the stream")
            if self.config.depth_keep is not None:
                raise ValueError("context must be None for a model with bounded slots (depth_keep)")
            angles = self._rotary(context.positions(T, x.device))
            parts = context.stream(*(self._allocate(B, T // 2, x) for _ in range(2)))
            return self.logits(self.hidden(x, angles, parts))
        if stream is None:
            stream = self.stream(B, T, like=x)
        return self.logits(self.hidden(x, self.rotary(T, device=x.device), stream))

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: logits (..., vocab_size) of hidden (..., C)."""
        return output_layer(hidden, self.embedding, self.config.vocab_size)


def allocate_stream(
    slots: int, batch: int, tokens: int, kv_heads: int, head_dim: int, *, like: Tensor
) -> DepthStream:
    """An empty stream for what blocks compute of x like this, under autocast or without."""
    return DepthStream.allocate(slots, batch, tokens, kv_heads, head_dim, like=like)
