"""Compile every kernel for a GPU that is not there; print what shared memory each needs, in bytes.

    python tests/kernels/compile_for.py CAPABILITY SHARED_MEMORY HEAD_DIM DTYPE G

The driver and torch's kernels are stand-ins, tensors lie on the CPU, and nothing is launched.
"""

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget

CAPABILITY, SHARED_MEMORY, D, DTYPE, G = sys.argv[1:]


class Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(CAPABILITY), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


triton.runtime.driver.set_active(Driver())

from moda_kernels import (  # noqa: E402
    backward_delta,
    backward_depth,
    backward_dkv,
    backward_dq,
    forward,
    forward_depth,
    operators,
    tuning,
)

needed: dict[str, int] = {}


class Compiling:
    """Stands for a kernel: compiles where that would launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        def compile(*arguments: Any, **constants: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            name = self.kernel.fn.__name__
            needed[name] = max(needed.get(name, 0), compiled.metadata.shared)

        return compile


for module in (forward, forward_depth, backward_delta, backward_depth, backward_dq, backward_dkv):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Compiling(getattr(module, name)))
tuning.shared_memory = lambda device: int(SHARED_MEMORY)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, DTYPE))


T, H, L, d = 64, 1, 20, int(D)
q, k, depth = zeros(1, T, H * int(G), d), zeros(1, T, H, d), [zeros(1, T, L, H, d)]
for plan in ("fused", "split"):
    options = 1.0, None, 0, None, plan
    out, lse = operators.attention(q, k, k, depth, depth, *options)
    operators.attention_backward(q, None, q, k, k, depth, depth, out, lse, *options)
print(json.dumps(needed))
