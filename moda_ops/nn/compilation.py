"""Compile a model block by block."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from moda_ops import private
from moda_ops.nn.model import MoDABlock, MoDATransformer
from moda_ops.stream.depth_slots import DepthSlots
from moda_ops.stream.depth_stream import DepthStream


def compile_blocks(model: MoDATransformer, **options: Any) -> None:
    """Compile every block as one graph, in place; blocks of a kind share their graphs.

    That is with a :class:`moda_ops.DepthStream`. With :class:`moda_ops.DepthSlots` every block has
    a graph of its own, because each takes another number of slots. Other streams run uncompiled:
    :func:`generate` has ``compile=True`` of its own, and ``depth_use`` looks at eager blocks.

    PyTorch compiles a function again for gradients on or off and for other lengths and batch sizes,
    and stops at 8 variants (``torch._dynamo.config.recompile_limit``), with an error under
    ``fullgraph``. The first block, which reads no slot, and the last one, which writes none, are
    variants too. ``block.compile()`` makes all of them variants of one function, which is too much;
    here each kind of block is a function.

    Args:
        model: a language model or a classifier. Parameters keep their names, and a copy of the
            model is not compiled.
        options: of ``torch.compile``; ``fullgraph`` is True unless given. ``dynamic=True`` compiles
            once for all lengths, where PyTorch otherwise compiles again at the second length.

    Example:
        >>> from moda_ops.nn import MoDAConfig, MoDALanguageModel
        >>> model = MoDALanguageModel(MoDAConfig(
        ...     vocab_size=256, layers=4, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... ))
        >>> compile_blocks(model, backend="eager")
        >>> with torch.no_grad():
        ...     model(torch.randint(256, (1, 5))).shape
        torch.Size([1, 5, 256])
    """
    options = {"fullgraph": True} | options
    kinds = _kinds(model)
    shared = {kind: torch.compile(_function(f"block_{kind}"), **options) for kind in set(kinds)}
    for i, (block, kind) in enumerate(zip(model.blocks, kinds, strict=True)):
        alone = torch.compile(_function(f"block_{i}"), **options)
        call = partial(_call, {DepthStream: shared[kind], DepthSlots: alone}, block)
        block._compiled_call_impl = call  # as Module.compile does


Kind = tuple[int, bool, bool]
"""Slots before the block, 2 for more than one; whether any was dropped; whether it writes none."""


def _kinds(model: MoDATransformer) -> list[Kind]:
    config, positions = model.config, model.kept_positions
    slots = list(accumulate(config.depth_writes()))
    if config.depth_keep is not None:
        slots = [len(kept) for kept in config.depth_keep]
    first = next((i for i, kept in enumerate(positions) if kept is not None), config.layers)
    ends = [isinstance(block, MoDABlock) and not block.continues for block in model.blocks]
    return [(min(n, 2), i >= first, ends[i]) for i, n in enumerate(slots)]


def _run(block: nn.Module, *inputs: Any) -> Any:
    return block._call_impl(*inputs)


def _function(name: str) -> Callable[..., Any]:
    """``_run`` with a code object of its own: PyTorch counts variants by code object."""
    return FunctionType(_run.__code__.replace(co_name=name), globals())


def _call(
    compiled: dict[type, Callable[..., Any]],
    block: nn.Module,
    x: Tensor,
    rotary: Any,
    stream: Any,
) -> Any:
    if isinstance(stream, DepthStream) and not torch.compiler.is_compiling():
        # Otherwise Dynamo specialises on the second block's number of slots.
        private.mark_dynamic(stream.token, 0)
    return compiled.get(type(stream), _run)(block, x, rotary, stream)
