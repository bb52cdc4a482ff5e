"""The layers of a block: rotary embedding, norm, attention, feed-forward, and their writes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moda_ops.nn.config import BlockConfig
from moda_ops.stream.protocol import StreamT

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of every position's angles, each (T, 1, D / 2) or (B, T, 1, D / 2), float32."""


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> Rotary:
    """Cosine and sine of ``position * base^(-2i / D)`` for i = 0 .. D/2 - 1.

    (arXiv 2104.09864, section 3.2.2.)

    Args:
        positions: (T,), or (B, T) where they differ from sequence to sequence; integer.
        head_dim: D.
        base: base of the wavelengths.

    Returns:
        Two float32 tensors (T, 1, D / 2) or (B, T, 1, D / 2).

    Example:
        >>> cos, sin = rotary_angles(torch.arange(3), head_dim=4, base=100.0)
        >>> cos.shape
        torch.Size([3, 1, 2])
        >>> sin[:, 0, 1]  # the slower angle: 0.1 per token
        tensor([0.0000, 0.0998, 0.1987])
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[..., None, None] * base**-exponent
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) by each token's angles (arXiv 2104.09864, 3.4.2).

    Args:
        x: (B, T, heads, D).
        rotary: angles of the T tokens, or of the B * T; None leaves x as it is.

    Returns:
        (B, T, heads, D) in x's dtype.

    Example:
        >>> x = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
        >>> rotate(x, rotary_angles(torch.arange(2), 2, 100.0))[0, :, 0]
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    if rotary is None:
        return x
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).type_as(x)


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + 1e-6) * gain`` over the last axis (arXiv 1910.07467, eq. 4).

    Unlike its base class it adds the same constant in every dtype, and under autocast it takes
    float32 gains beside a bfloat16 input.

    Args:
        size: of the last axis.
        gain: whether there is a gain to learn, (size,).

    Example:
        >>> RMSNorm(2)(torch.tensor([3.0, 4.0])) * 12.5**0.5
        tensor([3.0000, 4.0000], grad_fn=<MulBackward0>)
    """

    def __init__(self, size: int, *, gain: bool = True) -> None:
        super().__init__(size, eps=1e-6, elementwise_affine=gain)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized x, in x's shape and dtype."""
        gain = None if self.weight is None else self.weight.type_as(x)
        return F.rms_norm(x, self.normalized_shape, gain, self.eps)


class TokenEmbedding(nn.Embedding):
    """The vocabulary's matrix: rows for tokens in, logits out.

    One module does both, so that whatever manages its weight, such as FSDP2 or offloading, has it
    in place both times. Forward hooks see both calls.

    Example:
        >>> embedding = TokenEmbedding(7, 4)
        >>> x = embedding(torch.tensor([[1, 2, 3]]))
        >>> x.shape, embedding(x).shape
        (torch.Size([1, 3, 4]), torch.Size([1, 3, 7]))
    """

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., C) for integers x (...); logits (..., vocab_size) for hidden x (..., C)."""
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


def check_tokens(name: str, tokens: Tensor) -> None:
    """Raise unless they are (B, T), and integers: a :class:`TokenEmbedding` takes floats."""
    if tokens.is_floating_point():
        raise TypeError(f"{name} must be integers, got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"{name} must have shape (B, T), got {tuple(tokens.shape)}")


def output_layer(hidden: Tensor, embedding: nn.Module, vocab_size: int) -> Tensor:
    """Logits (..., vocab_size) of hidden (..., C).

    A module that has taken the place of the :class:`TokenEmbedding`, an adapter for instance, is
    asked for the rows of all tokens.
    """
    if isinstance(embedding, TokenEmbedding):
        return embedding(hidden)
    return F.linear(hidden, embedding(torch.arange(vocab_size, device=hidden.device)))


class MoDAAttention(nn.Module):
    """Attention over the sequence and the depth stream under one softmax.

    arXiv 2603.15619, section 2, mechanism (d), with grouped queries (arXiv 2305.13245) and, as an
    option, normalized queries and keys (arXiv 2302.05442, section 2). With an empty stream it is
    plain attention, causal unless ``config.causal`` is off.

    Example:
        >>> config = BlockConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> from moda_ops import DepthSlots
        >>> layer, rotary = MoDAAttention(config), rotary_angles(torch.arange(5), 8, 1e4)
        >>> y, stream = layer(torch.randn(1, 5, 32), rotary, DepthSlots())
        >>> y, stream = layer(y, rotary, stream)
        >>> y.shape, stream.written
        (torch.Size([1, 5, 32]), 2)
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.causal = config.causal
        self.q_proj = nn.Linear(config.width, config.q_width, bias=config.bias)
        self.k_proj = nn.Linear(config.width, config.kv_width, bias=config.bias)
        self.v_proj = nn.Linear(config.width, config.kv_width, bias=config.bias)
        self.out_proj = nn.Linear(config.q_width, config.width, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (B, T, HQ, D), rotated k and v (B, T, H, D) of x (B, T, C)."""
        heads = (-1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, heads)), rotary)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, heads)), rotary)
        return q, k, self.v_proj(x).unflatten(-1, heads)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        stream: StreamT,
        *,
        write: bool = True,
        read: bool = True,
    ) -> tuple[Tensor, StreamT]:
        """Output (B, T, C) for x (B, T, C), and the stream.

        With ``write`` the layer's own key and value are its next slot. Without ``read`` (nor
        ``write``) it is plain attention.
        """
        q, k, v = self.project(x, rotary)
        if write:
            out, stream = stream.write(k, v).attend(q, causal=self.causal)
        elif read:
            out, stream = stream.attend(q, k, v, causal=self.causal)
        else:
            out, stream = stream.attend_sequence(q, k, v, causal=self.causal)
        return self.out_proj(out.flatten(2)), stream


class FeedForward(nn.Module):
    """SwiGLU, ``W3 (silu(W1 x) * W2 x)`` (arXiv 2002.05202, eq. 6).

    Example:
        >>> config = BlockConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> FeedForward(config)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.out_proj = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Output (B, T, C) for x (B, T, C)."""
        out: Tensor = self.out_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DepthProjection(nn.Module):
    """The light key/value projection by which a layer writes to the depth stream.

    arXiv 2603.15619, Table 3, "FFN KV projection" and "attention KV projection". Under ``qk_norm``
    its keys are normalized as sequence keys are, but without a gain to learn: the paper's Table 6
    counts no such parameters.

    Example:
        >>> config = BlockConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> rotary = rotary_angles(torch.arange(5), 8, 1e4)
        >>> k, v = DepthProjection(config)(torch.randn(1, 5, 32), rotary)
        >>> k.shape
        torch.Size([1, 5, 2, 8])
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.k_proj = nn.Linear(config.width, config.kv_width, bias=config.bias)
        self.v_proj = nn.Linear(config.width, config.kv_width, bias=config.bias)
        self.k_norm = RMSNorm(config.head_dim, gain=False) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Rotated key and value, each (B, T, H, D), of x (B, T, C)."""
        heads = (-1, self.head_dim)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, heads)), rotary)
        return k, self.v_proj(x).unflatten(-1, heads)


class DepthAttention(nn.Module):
    """Attention over depth alone: write a layer's output, then read all slots at the same token.

    arXiv 2603.15619, section 2, mechanism (c): an output X_l gives Q_l, K_l and V_l, and the next
    layer's input is ``Attention(Q_l, {K_i}, {V_i})``, i = 0 .. l. There is no output projection:
    HQ * D = C.

    Example:
        >>> config = BlockConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> rotary = rotary_angles(torch.arange(5), 8, 1e4)
        >>> from moda_ops import DepthSlots
        >>> stream = DepthSlots().write(*DepthProjection(config)(torch.randn(1, 5, 32), rotary))
        >>> x, stream = DepthAttention(config)(torch.randn(1, 5, 32), rotary, stream)
        >>> x.shape, stream.written
        (torch.Size([1, 5, 32]), 2)
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.q_width, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.write = DepthProjection(config)

    def forward(self, x: Tensor, rotary: Rotary | None, stream: StreamT) -> tuple[Tensor, StreamT]:
        """The next layer's input (B, T, C), for a layer's output x (B, T, C), and the stream."""
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), rotary)
        k, v = self.write(x, rotary)
        out, stream = stream.write(k, v).attend_depth(q)
        return out.flatten(2), stream
