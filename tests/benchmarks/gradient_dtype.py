"""What rounding a depth stream's running gradient costs, against float64, in a model of 48 layers.

    python tests/benchmarks/gradient_dtype.py       (CPU, a minute)

First everything else is exact: a float64 model whose running gradient alone is rounded after each
reader. No error, or one above half a unit per reader, makes the exit code 1. Then all of it runs in
bfloat16.
"""

import argparse
import math
import pathlib
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from moda_ops import DepthStream  # noqa: E402
from moda_ops.nn import MoDAConfig, MoDALanguageModel  # noqa: E402

BATCH, TOKENS = 2, 64


def gradients(
    model: MoDALanguageModel, tokens: Tensor, dtype: torch.dtype, grad_dtype: torch.dtype
) -> Tensor:
    """All parameters' gradients of the loss, as one float64 vector."""
    model = model.to(dtype)
    c = model.config
    stream = DepthStream.allocate(
        c.depth_slots(), *tokens.shape, c.kv_heads, c.head_dim, dtype=dtype, grad_dtype=grad_dtype
    )
    logits = model(tokens, stream)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten().double() for g in grads])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    for layers in parser.parse_args().layers:
        torch.manual_seed(0)
        config = MoDAConfig(
            vocab_size=64,
            layers=layers,
            width=128,
            heads=4,
            kv_heads=2,
            head_dim=32,
            hidden=256,
        )
        model = MoDALanguageModel(config).bfloat16()  # so that all runs have the same weights
        tokens = torch.randint(64, (BATCH, TOKENS))
        exact = gradients(model, tokens, torch.float64, torch.float64)
        for dtype, grad_dtype in (
            (torch.float64, torch.float32),
            (torch.float64, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        ):
            grads = gradients(model, tokens, dtype, grad_dtype)
            error = ((grads - exact).norm() / exact.norm()).item()
            print(f"{layers} layers, model {dtype}, running gradient {grad_dtype}: {error:.1e}")
            roundings = layers if dtype == torch.float64 else math.inf
            if not 0 < error < roundings * torch.finfo(grad_dtype).eps / 2:
                sys.exit("wrong: not the rounding of each reader")


if __name__ == "__main__":
    main()
