"""An image classifier over the depth stream: the same blocks, and every patch sees all others."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from moda_ops.nn.config import BlockConfig
from moda_ops.nn.model import MoDATransformer
from moda_ops.stream.protocol import Stream


@dataclass(frozen=True, kw_only=True)
class VisionConfig(BlockConfig):
    """Sizes and options of a :class:`MoDAClassifier`: those of its blocks, and its own.

    Args:
        image_size: pixels on a side.
        patch_size: pixels on a side of a patch; divides ``image_size``.
        channels: of an image.
        classes: number of classes.
        causal: False, unless patches are to see only those before them, in reading order.

    Raises:
        ValueError: see :class:`BlockConfig`; also a ``patch_size`` that does not divide.

    Example:
        >>> VisionConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64, image_size=8,
        ...     patch_size=2, channels=1, classes=10,
        ... ).tokens  # 16 patches and the class token
        17
    """

    image_size: int
    patch_size: int
    channels: int
    classes: int
    causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_sizes("image_size", "patch_size", "channels", "classes")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size = {self.patch_size} must divide image_size = {self.image_size}"
            )

    @property
    def tokens(self) -> int:
        """T, the number of patches and the class token, which comes last."""
        return (self.image_size // self.patch_size) ** 2 + 1


class PatchEmbedding(nn.Module):
    """Patches and a class token, each with a learned position (arXiv 2010.11929, eq. 1).

    The class token has no input: it is its position.

    Example:
        >>> config = VisionConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64, image_size=8,
        ...     patch_size=2, channels=1, classes=10,
        ... )
        >>> import torch
        >>> PatchEmbedding(config)(torch.randn(3, 1, 8, 8)).shape
        torch.Size([3, 17, 32])
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(config.channels * config.patch_size**2, config.width)
        self.positions = nn.Embedding(config.tokens, config.width)

    def forward(self, images: Tensor) -> Tensor:
        """x (B, T, C) of images (B, channels, image_size, image_size)."""
        patches = F.pixel_unshuffle(images, self.patch_size).flatten(2).mT
        return F.pad(self.proj(patches), (0, 0, 0, 1)) + self.positions.weight


class MoDAClassifier(MoDATransformer):
    """A vision transformer (arXiv 2010.11929, 2012.12877) whose layers read earlier layers.

    Positions are learned and nothing is rotated: a key of the sequence is a key of depth as it is.

    Example:
        >>> config = VisionConfig(
        ...     layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64, image_size=8,
        ...     patch_size=2, channels=1, classes=10, norm="pre",
        ... )
        >>> import torch
        >>> MoDAClassifier(config)(torch.randn(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    config: VisionConfig
    embedding: PatchEmbedding

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config, PatchEmbedding(config))
        self.head = nn.Linear(config.width, config.classes)
        self.reset_module("head", self.head)

    def reset_module(self, name: str, module: nn.Module) -> None:
        """As for every model, but positions have the size of a patch of unit variance, 1."""
        super().reset_module(name, module)
        if module is self.embedding.positions:
            nn.init.normal_(module.weight)

    def forward(self, images: Tensor, stream: Stream | None = None) -> Tensor:
        """Logits (B, classes) of images.

        Args:
            images: (B, channels, image_size, image_size) in the dtype of the weights.
            stream: an empty stream; default a :class:`moda_ops.DepthStream` of the right size.

        Raises:
            TypeError: images are no floating-point tensor.
            ValueError: images of another size.
        """
        c = self.config
        if not isinstance(images, Tensor) or not images.is_floating_point():
            given = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point torch.Tensor, got {given}")
        if images.dim() != 4 or images.shape[1:] != (c.channels, c.image_size, c.image_size):
            raise ValueError(
                "images must be (B, channels, image_size, image_size) = "
                f"(B, {c.channels}, {c.image_size}, {c.image_size}), got {tuple(images.shape)}"
            )
        x = self.embedding(images)
        if stream is None:
            stream = self.stream(len(x), c.tokens, like=x)
        return self.head(self.hidden(x, None, stream)[:, -1])
