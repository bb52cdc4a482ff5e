"""Time and memory of a training step of the language model, by how it is sharded.

    torchrun --standalone --nproc-per-node 2 tests/benchmarks/parallel_step.py [--json FILE]

Made for two GPUs; tiny on CPUs. Every layout takes the same global batch, forward, backward and
AdamW, blocks in bfloat16 over float32 parameters (FSDP2):

    one       nothing is shared: every GPU takes the whole batch
    data      sequences shared out
    context   tokens shared out
    tensor    heads, hidden units and vocabulary shared out

with depth "kv+ffn" and without, "residual". First, each layout's gradients are compared, parameter
by parameter, with those of one GPU in float32; a row is timed only if their errors are at most
twice those of one GPU in bfloat16. Times are medians in milliseconds, the slowest GPU's; memory is
the peak of the fullest GPU, in GB.
"""

import argparse
import copy
import gc
import json
import pathlib
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "docs" / "examples")]

from train_parallel import make_optimizer, parallelize, shard, start  # noqa: E402

from moda_ops.nn import MoDAConfig, MoDALanguageModel  # noqa: E402

CUDA = torch.cuda.is_available()
CONFIG = (
    MoDAConfig(
        vocab_size=32_000, layers=24, width=1024, heads=16, kv_heads=8, head_dim=64, hidden=4096
    )
    if CUDA
    else MoDAConfig(vocab_size=96, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64)
)
LAYOUTS = ("one", "data", "context", "tensor")
STEPS, WARM = (10, 3) if CUDA else (2, 1)
FACTOR = 2.0  # of the error of one GPU in bfloat16
Grads = dict[str, Tensor]


def make_model(config: MoDAConfig, device: torch.device) -> MoDALanguageModel:
    torch.manual_seed(0)
    return MoDALanguageModel(config).to(device)


def whole_loss(model: MoDALanguageModel, text: Tensor) -> None:
    logits = model(text[:, :-1]).flatten(0, 1)
    F.cross_entropy(logits.float(), text[:, 1:].flatten()).backward()


def gradients(model: MoDALanguageModel) -> Grads:
    """Whole ones, on the CPU."""
    grads = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        grads[name] = grad.detach().float().cpu()
    return grads


def worst_ratio(grads: Grads, plain: Grads, exact: Grads) -> tuple[float, float]:
    """Largest error over plain's, and largest relative error, of any parameter."""
    errors = {name: (grads[name] - x).norm().item() for name, x in exact.items()}
    allowed = {name: (plain[name] - x).norm().item() for name, x in exact.items()}
    assert all(x > 0 for x in allowed.values()), "a parameter has no rounding error to compare with"
    return (
        max(errors[name] / allowed[name] for name in exact),
        max(errors[name] / x.norm().item() for name, x in exact.items()),
    )


def make_step(config: MoDAConfig, layout: str, text: Tensor) -> tuple[MoDALanguageModel, Any]:
    """A model and the function that runs forward and backward over a global batch."""
    model, size = make_model(config, text.device), dist.get_world_size()
    if layout == "one":
        mesh = init_device_mesh(text.device.type, (size, 1), mesh_dim_names=("all", "one"))
        shard(model, mesh["one"], torch.bfloat16)
        return model, lambda: whole_loss(model, text)
    context, tensor = (size if layout == name else 1 for name in ("context", "tensor"))
    setup = parallelize(model, context, tensor, torch.bfloat16)
    return model, lambda: setup.loss(text)


def synchronize() -> None:
    dist.barrier()
    if CUDA:
        torch.cuda.synchronize()


def greatest(value: float, device: torch.device) -> float:
    x = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def measure(
    config: MoDAConfig, layout: str, text: Tensor, check: Tensor, exact: Grads, plain: Grads
) -> dict[str, Any]:
    device, row = text.device, dict(depth=config.depth, layout=layout, gpus=dist.get_world_size())
    model, step = make_step(config, layout, check)
    step()
    ratio, error = (greatest(x, device) for x in worst_ratio(gradients(model), plain, exact))
    row |= dict(error=error, error_over_plain=ratio)
    if ratio > FACTOR:
        return row | dict(failed=f"error {ratio:.2f} times that of one GPU in bfloat16")
    del model, step
    gc.collect()
    model, step = make_step(config, layout, text)
    optimizer, times = make_optimizer(model, lr=1e-5), []
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM + STEPS):
        synchronize()
        begin = time.perf_counter()
        step()
        optimizer.step()
        optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()
        times.append(greatest(time.perf_counter() - begin, device))
    seconds, batch = statistics.median(times[WARM:]), text.shape[0]
    tokens = batch * (text.shape[1] - 1)
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
    return row | dict(
        batch=batch, tokens=text.shape[1] - 1, ms=1e3 * seconds, tokens_per_s=tokens / seconds,
        peak_gb=greatest(peak, device),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--batch", type=int, default=2, help="of all GPUs")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 16384] if CUDA else [16])
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--depths", nargs="*", default=["kv+ffn", "residual"])
    options = parser.parse_args(arguments)
    device, rows = start(), []
    versions = dict(torch=torch.__version__, gpu=torch.cuda.get_device_name() if CUDA else "cpu")
    for depth in options.depths:
        config = replace(CONFIG, depth=depth)
        generator = torch.Generator().manual_seed(1)
        texts = [
            torch.randint(config.vocab_size, (options.batch, T + 1), generator=generator).to(device)
            for T in options.tokens
        ]
        check = texts[0][:, : min(512, min(options.tokens)) + 1]
        single = make_model(config, device)
        half = copy.deepcopy(single).to(torch.bfloat16)
        for model in (single, half):
            whole_loss(model, check)
        exact, plain = gradients(single), gradients(half)
        del single, half, model
        for layout in options.layouts:
            for text in texts:
                row = measure(config, layout, text, check, exact, plain)
                gc.collect()
                rows.append(row)
                if dist.get_rank() == 0:
                    print(json.dumps(row), flush=True)
    if dist.get_rank() == 0 and options.json is not None:
        options.json.write_text(json.dumps(dict(versions=versions, rows=rows), indent=1) + "\n")
    dist.destroy_process_group()
    if any("failed" in row for row in rows):
        sys.exit("a layout's gradients are wrong: not timed")


if __name__ == "__main__":
    main()
