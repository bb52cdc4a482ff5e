"""Pipeline parallelism: a run of blocks of the language model, and what crosses its boundaries."""

import torch
from torch import Tensor, nn

from moda_ops.nn.layers import check_tokens, output_layer, rotary_angles
from moda_ops.nn.model import MoDABlock, MoDALanguageModel, allocate_stream
from moda_ops.stream.depth_slots import DepthSlots
from moda_ops.stream.depth_stream import DepthStream


class PipelineStage(nn.Module):
    """Blocks ``first`` to ``last - 1`` of a language model, as a stage of a pipeline.

    Between stages travel the residual stream and the depth slots that the blocks so far have
    written, one tensor each: plain inputs and outputs for
    :class:`torch.distributed.pipelining.PipelineStage`, whose gradients travel back. The first
    stage takes tokens, the last one returns logits.

    The stage holds the model's own modules, under their names in the model. First and last stage
    both hold the embedding, which is the output layer too: add their gradients up before the
    optimizer's step.

    Args:
        model: any ``depth`` but ``"attention"``, with all its slots.
        first: number of the stage's first block.
        last: number of the block after its last.

    Raises:
        ValueError: the blocks do not exist, or the model is of another kind.

    Example:
        >>> from moda_ops.nn import MoDAConfig
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=3, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model, tokens = MoDALanguageModel(config), torch.randint(256, (1, 5))
        >>> begin, end = PipelineStage(model, 0, 1), PipelineStage(model, 1, 3)
        >>> x, slots = begin(tokens)
        >>> x.shape, slots.shape  # (B, T, C), (slots, B, T, H, 2 D)
        (torch.Size([1, 5, 32]), torch.Size([2, 1, 5, 2, 16]))
        >>> torch.allclose(end(x, slots), model(tokens), atol=1e-5)
        True
    """

    def __init__(self, model: MoDALanguageModel, first: int, last: int) -> None:
        super().__init__()
        layers = model.config.layers
        if not 0 <= first < last <= layers:
            raise ValueError(
                f"first = {first} and last = {last} must be a range of {layers} blocks"
            )
        if model.config.depth_keep is not None:
            raise ValueError("a model with bounded slots (depth_keep) cannot be a pipeline")
        if model.config.depth == "attention":
            raise ValueError("depth = 'attention' cannot be a pipeline: a layer's input is depth")
        self.config, self.kv_heads = model.config, model.kv_heads
        self.begins, self.ends = first == 0, last == layers
        self.embedding = model.embedding if self.begins or self.ends else None
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in range(first, last)})
        self.norm = model.norm if self.ends else nn.Identity()

    def forward(self, x: Tensor, slots: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The pair (x, slots) for the next stage, or logits.

        Args:
            x: tokens (B, T) for the first stage, else the residual stream (B, T, C).
            slots: (written, B, T, H, 2 D), keys and values side by side, from the stage before.
                Under ``depth="residual"`` there are none, and x travels alone.
        """
        if self.begins and self.embedding is not None:
            check_tokens("x", x)
            x = self.embedding(x)
        rotary = rotary_angles(
            torch.arange(x.shape[1], device=x.device), self.config.head_dim, self.config.rope_base
        )
        stream = self._stream(x, slots)
        for block in self.blocks.values():
            x, stream = block(x, rotary, stream)
        if self.ends and self.embedding is not None:
            return output_layer(self.norm(x), self.embedding, self.config.vocab_size)
        return (x, stream.read()) if isinstance(stream, DepthStream) else x

    def _stream(self, x: Tensor, slots: Tensor | None) -> DepthStream | DepthSlots:
        """What the stages before have written, and room for what this one writes."""
        if self.config.depth_slots() == 0:
            return DepthSlots()
        D, received = self.config.head_dim, [] if slots is None else slots.unbind()
        size = len(received) + sum(_writes(block) for block in self.blocks.values())
        B, T = x.shape[:2]
        stream = allocate_stream(size, B, T, self.kv_heads, D, like=x)
        for slot in received:
            stream = stream.write(slot[..., :D], slot[..., D:])
        return stream


def _writes(block: nn.Module) -> int:
    assert isinstance(block, MoDABlock)
    return int(block.writes) + (block.feed_forward_write is not None)
