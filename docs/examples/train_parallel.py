"""Train a MoDA language model on many devices: sharded by data, context and tensors.

    torchrun --standalone --nproc-per-node 4 docs/examples/train_parallel.py --context 2 --tensor 2

What --context and --tensor leave of the processes shares out the batch. Parameters, gradients and
optimizer state are sharded over data and context together (FSDP2). Runs on GPUs with NCCL, and
without any on CPUs with gloo. The text is made up: each sequence repeats a few random tokens.
"""

import argparse
import os
from collections import defaultdict
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

from moda_ops.nn import MoDAConfig, MoDALanguageModel
from moda_ops.nn.context_parallel import ContextParallel
from moda_ops.nn.tensor_parallel import tensor_parallel

CONFIG = MoDAConfig(
    vocab_size=128, layers=4, width=128, heads=8, kv_heads=4, head_dim=16, hidden=256
)


class Setup(NamedTuple):
    """A sharded model and which part of a batch this process takes."""

    model: MoDALanguageModel
    context: ContextParallel | None
    data: int  # parts of the batch
    part: int  # this process's
    loss_context: type[nullcontext] | type[loss_parallel]

    def share(self, batch: Tensor) -> Tensor:
        """This process's sequences, and of these its tokens, of (B, T)."""
        rows = batch.chunk(self.data)[self.part]
        return rows if self.context is None else self.context.shard(rows, 1)

    def loss(self, text: Tensor) -> Tensor:
        """Mean over this process's tokens of text (B, T + 1), with its backward done."""
        tokens, targets = self.share(text[:, :-1]), self.share(text[:, 1:])
        with self.loss_context():
            logits = self.model(tokens, context=self.context)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            loss.backward()
        return loss.detach()


def shard(model: MoDALanguageModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard float32 parameters, block by block, over a mesh of one dimension."""
    # Inputs of blocks stay what they are: angles and running gradients may be float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def parallelize(
    model: MoDALanguageModel, context: int, tensor: int, dtype: torch.dtype = torch.float32
) -> Setup:
    """Shard ``model``, which computes in ``dtype``, over all processes."""
    size, device = dist.get_world_size(), model.embedding.weight.device.type
    shards = size // tensor
    mesh = init_device_mesh(device, (shards, tensor), mesh_dim_names=("shard", "tensor"))
    names = ("data", "context", "tensor")
    cube = init_device_mesh(device, (shards // context, context, tensor), mesh_dim_names=names)
    if tensor > 1:
        tensor_parallel(model, mesh["tensor"])
    shard(model, mesh["shard"], dtype)
    return Setup(
        model,
        ContextParallel(cube.get_group("context")) if context > 1 else None,
        shards // context,
        cube.get_local_rank("data"),
        loss_parallel if tensor > 1 else nullcontext,
    )


def make_optimizer(model: MoDALanguageModel, lr: float) -> torch.optim.AdamW:
    """AdamW, whose fused steps take parameters of one mesh at a time."""
    groups = defaultdict(list)
    for parameter in model.parameters():
        groups[getattr(parameter, "device_mesh", None)].append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=lr)


def make_text(batch: int, tokens: int, device: torch.device) -> Tensor:
    """(batch, tokens + 1), each row counting up from a random token; the same on every process."""
    first = torch.randint(CONFIG.vocab_size, (batch, 1))
    return ((first + torch.arange(tokens + 1)) % CONFIG.vocab_size).to(device)


def start() -> torch.device:
    """Join the processes that torchrun started."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=1, help="processes that share a sequence")
    parser.add_argument("--tensor", type=int, default=1, help="processes that share heads")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    device = start()
    torch.manual_seed(0)  # the same weights and text everywhere
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = MoDALanguageModel(CONFIG).to(device)
    setup = parallelize(model, options.context, options.tensor, dtype)
    optimizer = make_optimizer(model, lr=3e-3)
    for step in range(options.steps):
        loss = setup.loss(make_text(batch=8, tokens=64, device=device))
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 or (step + 1) % 20 == 0:
            loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
            if dist.get_rank() == 0:
                print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
