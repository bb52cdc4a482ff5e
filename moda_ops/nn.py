"""A decoder language model over the depth stream.

Every attention layer reads, beside its sequence, the keys and values that earlier layers wrote at
the same token. Attention writes its own; a feed-forward layer writes a light projection of its
input (arXiv 2603.15619, Table 3, row 4). A key is written after rotation at its own token: query
and depth key share a position, the rotations cancel, and the sequence key is the depth key.

The stream is a plain list of slots that the layers pass on and never stack. Shapes: B batch,
T tokens, C width, HQ query heads, H key/value heads, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moda_ops.attention import moda_attention

Slot = tuple[Tensor, Tensor]
"""Key and value that one layer wrote, each (B, T, H, D)."""

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of every position's angles, each (T, 1, D / 2), float32."""


@dataclass(frozen=True, kw_only=True)
class MoDAConfig:
    """Sizes of a :class:`MoDALanguageModel`.

    Args:
        vocab_size: number of tokens.
        layers: number of blocks.
        width: C, size of the residual stream.
        heads: HQ, query heads.
        kv_heads: H, key/value heads; divides ``heads``.
        head_dim: D, even.
        hidden: inner size of the feed-forward layers.
        rope_base: base of the rotary wavelengths.

    Raises:
        ValueError: sizes that do not fit together.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} must divide heads = {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even for the rotary embedding")


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> Rotary:
    """Cosine and sine of ``position * base^(-2i / D)`` for i = 0 .. D/2 - 1.

    (arXiv 2104.09864, section 3.2.2.)

    Args:
        positions: (T,), integer.
        head_dim: D.
        base: base of the wavelengths.

    Returns:
        Two float32 tensors (T, 1, D / 2).

    Example:
        >>> cos, sin = rotary_angles(torch.arange(3), head_dim=4, base=100.0)
        >>> cos.shape
        torch.Size([3, 1, 2])
        >>> sin[:, 0, 1]  # the slower angle: 0.1 per token
        tensor([0.0000, 0.0998, 0.1987])
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[:, None, None] * base**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) by each token's angles (arXiv 2104.09864, 3.4.2).

    Args:
        x: (B, T, heads, D).
        rotary: angles of the T tokens.

    Returns:
        (B, T, heads, D) in x's dtype.

    Example:
        >>> x = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
        >>> rotate(x, rotary_angles(torch.arange(2), 2, 100.0))[0, :, 0]
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).type_as(x)


class MoDAAttention(nn.Module):
    """Attention over the sequence and the depth stream under one softmax; writes its own K and V.

    arXiv 2603.15619, section 2, mechanism (d), with grouped queries (arXiv 2305.13245).

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> layer, rotary = MoDAAttention(config), rotary_angles(torch.arange(5), 8, 1e4)
        >>> y, slot = layer(torch.randn(1, 5, 32), rotary, stream=[])
        >>> y, slot = layer(y, rotary, stream=[slot])
        >>> y.shape, slot[0].shape
        (torch.Size([1, 5, 32]), torch.Size([1, 5, 2, 8]))
    """

    def __init__(self, config: MoDAConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.out_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (B, T, HQ, D), rotated k and v (B, T, H, D) of x (B, T, C)."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, heads), rotary)
        k = rotate(self.k_proj(x).unflatten(-1, heads), rotary)
        return q, k, self.v_proj(x).unflatten(-1, heads)

    def forward(self, x: Tensor, rotary: Rotary, stream: list[Slot]) -> tuple[Tensor, Slot]:
        """Output (B, T, C) for x (B, T, C), and the slot to write."""
        q, k, v = self.project(x, rotary)
        out = moda_attention(q, k, v, [k for k, _ in stream], [v for _, v in stream], causal=True)
        return self.out_proj(out.flatten(2)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU, ``W3 (silu(W1 x) * W2 x)`` (arXiv 2002.05202, eq. 6).

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> FeedForward(config)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(self, config: MoDAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.out_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Output (B, T, C) for x (B, T, C)."""
        out: Tensor = self.out_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DepthProjection(nn.Module):
    """The light key/value projection by which a layer writes its input to the depth stream.

    arXiv 2603.15619, Table 3, "FFN KV projection".

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> rotary = rotary_angles(torch.arange(5), 8, 1e4)
        >>> k, v = DepthProjection(config)(torch.randn(1, 5, 32), rotary)
        >>> k.shape
        torch.Size([1, 5, 2, 8])
    """

    def __init__(self, config: MoDAConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)

    def forward(self, x: Tensor, rotary: Rotary) -> Slot:
        """Rotated key and value, each (B, T, H, D), of x (B, T, C)."""
        heads = (-1, self.head_dim)
        k = rotate(self.k_proj(x).unflatten(-1, heads), rotary)
        return k, self.v_proj(x).unflatten(-1, heads)


class MoDABlock(nn.Module):
    """Attention and feed-forward, each as ``x = norm(x + f(x))`` (post-norm), and their writes.

    The last block's feed-forward writes nothing: nobody would read it.
    """

    def __init__(self, config: MoDAConfig, *, last: bool) -> None:
        super().__init__()
        self.attention = MoDAAttention(config)
        self.attention_norm = nn.RMSNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.RMSNorm(config.width)
        self.feed_forward_write = None if last else DepthProjection(config)

    def forward(self, x: Tensor, rotary: Rotary, stream: list[Slot]) -> tuple[Tensor, list[Slot]]:
        """Output (B, T, C) for x (B, T, C), and the stream with this block's slots appended."""
        y, slot = self.attention(x, rotary, stream)
        stream = [*stream, slot]
        x = self.attention_norm(x + y)
        if self.feed_forward_write is not None:
            stream = [*stream, self.feed_forward_write(x, rotary)]
        return self.feed_forward_norm(x + self.feed_forward(x)), stream


class MoDALanguageModel(nn.Module):
    """A decoder language model; its output layer is the transposed embedding.

    Block l (from 0) reads 2 l depth slots, two from each block before it.

    Example:
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model = MoDALanguageModel(config)
        >>> model(torch.randint(256, (1, 5))).shape
        torch.Size([1, 5, 256])
    """

    def __init__(self, config: MoDAConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            MoDABlock(config, last=i == config.layers - 1) for i in range(config.layers)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights with standard deviation 0.02 (embedding) and 1/sqrt(fan-in) (matrices).

        The 2 * layers matrices that write to the residual stream get 1/sqrt(2 * layers) of that
        (Radford et al. 2019, section 2.3).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.02)
            elif isinstance(module, nn.Linear):
                residual = 2 * self.config.layers if name.endswith("out_proj") else 1
                module.weight.normal_(std=(module.in_features * residual) ** -0.5)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def rotary(self, tokens: int) -> Rotary:
        """Angles of positions 0 .. tokens - 1."""
        positions = torch.arange(tokens, device=self.embedding.weight.device)
        return rotary_angles(positions, self.config.head_dim, self.config.rope_base)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of tokens (B, T)."""
        x, rotary = self.embedding(tokens), self.rotary(tokens.shape[1])
        stream: list[Slot] = []
        for block in self.blocks:
            x, stream = block(x, rotary, stream)
        return F.linear(x, self.embedding.weight)
