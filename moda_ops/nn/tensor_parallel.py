"""Tensor parallelism: heads, hidden units and vocabulary shared out among the ranks of a mesh."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from moda_ops.nn.layers import DepthProjection, FeedForward, MoDAAttention
from moda_ops.nn.model import MoDALanguageModel

# Of forward. One input for all of a module's projections sums their gradients before the ranks do.
ARGUMENTS = {MoDAAttention: 3, FeedForward: 1, DepthProjection: 2}


class VocabularyParallel(ParallelStyle):
    """A :class:`moda_ops.nn.TokenEmbedding` sharded by tokens: rows are whole, logits sharded."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, mesh, _shard_rows, _replicated, _rows_or_logits)


def _shard_rows(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        rows = distribute_tensor(parameter, mesh, [Shard(0)])
        module.register_parameter(key, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def _replicated(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)


def _rows_or_logits(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Any:
    if output.placements[0].is_shard():
        return output  # logits
    return output.redistribute(mesh, [Replicate()]).to_local()


def tensor_parallel(model: MoDALanguageModel, mesh: DeviceMesh) -> MoDALanguageModel:
    """Shard a language model over a mesh of one dimension, in place, and return it.

    Projections to queries, keys, values, depth slots and hidden units are sharded by columns, those
    back by rows (arXiv 1909.08053, section 3), and the embedding by tokens of the vocabulary. So
    each rank has H / ranks of the key/value heads, of the sequence and of the depth stream alike,
    with the query heads that read them, and runs the operators on plain tensors. Each block sums
    (B, T, C) over the ranks twice; in backward too, and once more for each of its depth
    projections. The depth stream itself is not communicated.

    Logits are a DTensor sharded over the vocabulary: take the loss under
    :func:`torch.distributed.tensor.parallel.loss_parallel`, or ``logits.full_tensor()``.

    Args:
        model: on every rank with the same weights. ``depth`` is any but ``"attention"``, where a
            layer's input is a row of all heads.
        mesh: its ranks divide ``kv_heads``.

    Raises:
        ValueError: the mesh or the model's sizes do not fit.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from moda_ops.nn import MoDAConfig
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> config = MoDAConfig(
        ...     vocab_size=256, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64
        ... )
        >>> model = tensor_parallel(MoDALanguageModel(config), init_device_mesh("cpu", (1,)))
        >>> model(torch.randint(256, (1, 5))).placements
        (Shard(dim=2),)
        >>> dist.destroy_process_group()
    """
    config = model.config
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}")
    if config.depth == "attention":
        raise ValueError("depth = 'attention' cannot be tensor parallel: an input is all heads")
    if config.kv_heads % mesh.size():
        raise ValueError(
            f"mesh has {mesh.size()} ranks, which must divide kv_heads = {config.kv_heads}"
        )
    plan: dict[str, ParallelStyle] = {"embedding": VocabularyParallel()}
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if type(module) in ARGUMENTS:
            layouts = (Replicate(), *[None] * (ARGUMENTS[type(module)] - 1))
            plan[name] = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
        elif kind == "out_proj":
            plan[name] = RowwiseParallel()
        elif kind.endswith("_proj"):
            plan[name] = ColwiseParallel()
        elif kind in ("q_norm", "k_norm") and getattr(module, "weight", None) is not None:
            plan[name] = SequenceParallel(sequence_dim=2, use_local_output=True)  # over heads
    parallelize_module(model, mesh, plan)
    model.kv_heads = config.kv_heads // mesh.size()
    return model
