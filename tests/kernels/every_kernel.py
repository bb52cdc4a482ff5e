"""Run every kernel once, for instance under a sanitizer. compile_for.py compiles the same calls.

    compute-sanitizer --tool memcheck python tests/kernels/every_kernel.py
    compute-sanitizer --tool racecheck python tests/kernels/every_kernel.py

On a machine without a GPU it runs them through Triton's interpreter.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(root / "kernels")]

import torch
from torch import Tensor


def attention(make: Callable[..., Tensor], T: int, L: int, D: int, G: int) -> Iterator[Any]:
    """Results of the forward and backward operators at one length and depth."""
    from moda_kernels import operators

    q, k, depth = make(1, T, G, D), make(1, T, 1, D), [make(1, T, L, 1, D)]
    for plan, slots in (("fused", []), ("fused", depth), ("split", depth)):
        options = 1.0, None, 0, None, plan
        if plan == "split" and k.dtype is torch.float32 and k.is_cuda:
            continue  # no library covers it
        out, lse = operators.attention(q, k, k, slots, slots, *options)
        dlse = lse if plan == "fused" else None
        yield out, lse
        yield operators.attention_backward(q, dlse, q, k, k, slots, slots, out, lse, *options)
    depths = depth, depth
    starts = torch.tensor([0, T], dtype=torch.int32, device=q.device)
    packed = 1.0, 5, 0, None, "auto", (starts, starts)
    yield operators.attention(q, k, k, *depths, *packed)
    yield operators.attention_backward(q, None, q, k, k, *depths, out, lse, *packed)
    yield operators.depth_mass(q, depth, lse, 1.0, None)
    chunk = 8, 1.0, None, None
    yield operators.chunk_attention(q, k, k, *depths, *chunk)
    yield operators.chunk_attention_backward(q, None, q, k, k, *depths, out, lse, *chunk)


def decoding(make: Callable[..., Tensor], D: int, G: int) -> Iterator[Any]:
    """Results of a decoding step over caches of several forms."""
    from moda_kernels import operators

    q, k, depth = make(1, 1, G, D), make(1, 1, 1, D), [make(1, 1, 1, 1, D)]
    lengths = torch.zeros(1, dtype=torch.int32, device=q.device)
    table = torch.zeros(1, 4, dtype=torch.int32, device=q.device)
    for page_size in (3, 16, 128):
        caches = make(4, page_size, 1, D), make(4, page_size, 1, D)
        new = depth, depth, lengths, table, k, k
        yield operators.decode(q, *caches, *new, 1.0, None, None)
    caches = make(1, 64, 1, D), make(1, 64, 1, D)
    yield operators.decode(q, *caches, depth, depth, lengths, None, None, None, 1.0, None, None)


def main() -> int:
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).div(8).to(dtype)

    for D, G in ((64, 2), (128, 5)) if cuda else ((16, 2),):
        for T, L in ((200, 20), (17, 3)) if cuda else ((17, 3),):
            for result in (*attention(make, T, L, D, G), *decoding(make, D, G)):
                tensors = result if isinstance(result, tuple) else (result,)
                for x in tensors:
                    for tensor in x if isinstance(x, list) else [x]:
                        assert tensor.isfinite().all(), tensor.shape
    print("every kernel has run on", torch.cuda.get_device_name() if cuda else "a CPU, interpreted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
