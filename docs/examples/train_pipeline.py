"""Train a MoDA language model as a pipeline, one stage per process.

    torchrun --standalone --nproc-per-node 2 docs/examples/train_pipeline.py

Between stages travel the residual stream and the depth slots written so far, one tensor each. The
first and the last stage hold the same embedding and add its gradients up.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from train_parallel import CONFIG, make_text, start

from moda_ops.nn import MoDALanguageModel, pipeline


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--microbatches", type=int, default=4)
    options = parser.parse_args(arguments)
    device = start()
    rank, stages = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = MoDALanguageModel(CONFIG).to(device)
    bounds = [CONFIG.layers * i // stages for i in range(stages + 1)]
    part = pipeline.PipelineStage(model, bounds[rank], bounds[rank + 1])
    schedule = Schedule1F1B(
        PipelineStage(part, rank, stages, device), options.microbatches, loss_fn=loss_of
    )
    ends = dist.new_group([0, stages - 1])
    optimizer = torch.optim.AdamW(part.parameters(), lr=3e-3)
    for step in range(options.steps):
        text, losses = make_text(batch=8, tokens=64, device=device), []
        inputs = (text[:, :-1].contiguous(),) if rank == 0 else ()  # torch 2.11 checks strides
        target = text[:, 1:] if rank == stages - 1 else None
        schedule.step(*inputs, target=target, losses=losses)
        if rank in (0, stages - 1):
            dist.all_reduce(part.embedding.weight.grad, group=ends)
        optimizer.step()
        optimizer.zero_grad()
        if rank == stages - 1 and (step == 0 or (step + 1) % 20 == 0):
            print(f"step {step + 1}: loss {sum(losses).item() / len(losses):.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
