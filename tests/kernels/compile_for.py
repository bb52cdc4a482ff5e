"""Compile every kernel for a GPU that is not there; print what shared memory each needs, in bytes,
and how often they have been compiled in all after each of three lengths.

    TRITON_INTERPRET=0 python compile_for.py CAPABILITY SHARED_MEMORY HEAD_DIM DTYPE G

The driver is a stand-in, tensors lie on the CPU, and nothing is launched.
"""

import importlib
import json
import pkgutil
import re
import sys
from typing import Any


class Driver:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiling:
    """Stands for a kernel: compiles where that would launch, and notes the shared memory."""

    def __init__(self, kernel: Any, needed: dict[str, int]) -> None:
        self.kernel, self.needed, self.arg_names = kernel, needed, kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        def compile(*arguments: Any, **constants: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            name = self.kernel.fn.__name__
            self.needed[name] = max(self.needed.get(name, 0), compiled.metadata.shared)

        return compile


def main(capability: str, shared_memory: str, head_dim: str, dtype: str, group: str) -> None:
    import torch
    import triton

    triton.runtime.driver.set_active(Driver(int(capability)))
    import moda_kernels
    from moda_kernels import library, operators, tuning

    kernels, needed = [], dict[str, int]()
    for info in pkgutil.iter_modules(moda_kernels.__path__):
        module = importlib.import_module(f"moda_kernels.{info.name}")
        for name in [name for name in vars(module) if re.fullmatch("_moda_.*_kernel", name)]:
            kernels.append(getattr(module, name))
            setattr(module, name, Compiling(kernels[-1], needed))
    tuning.shared_memory = lambda device: int(shared_memory)
    by_library = library.attention
    library.attention = lambda *a: tuple(x.contiguous() for x in by_library(*a))  # as cuDNN does

    H, D, G = 1, int(head_dim), int(group)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    compilations = []
    for T, L in ((64, 20), (17, 16), (1, 1)):
        q, k, depth = zeros(1, T, H * G, D), zeros(1, T, H, D), [zeros(1, T, L, H, D)]
        for plan, slots in (("fused", []), ("fused", depth), ("split", depth)):
            options = 1.0, None, 0, None, plan
            out, lse = operators.attention(q, k, k, slots, slots, *options)
            dlse = lse if plan == "fused" else None
            operators.attention_backward(q, dlse, q, k, k, slots, slots, out, lse, *options)
        depths = depth, depth
        starts = torch.zeros(2, dtype=torch.int32)
        packed = 1.0, 5, 0, None, "auto", (starts, starts)
        operators.attention(q, k, k, *depths, *packed)
        operators.attention_backward(q, None, q, k, k, *depths, out, lse, *packed)
        operators.depth_mass(q, depth, lse, 1.0, None)
        chunk = 8, 1.0, None, None
        operators.chunk_attention(q, k, k, *depths, *chunk)
        operators.chunk_attention_backward(q, None, q, k, k, *depths, out, lse, *chunk)
        compilations.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
    lengths, table = starts[:1], torch.zeros(1, 4, dtype=torch.int32)
    for page_size in (3, 16, 128):
        cache = zeros(4, page_size, H, D)
        operators.decode(q, cache, cache, *depths, lengths, table, k, k, 1.0, None, None)
    cache = zeros(1, 64, H, D)
    operators.decode(q, cache, cache, *depths, lengths, None, None, None, 1.0, None, None)
    print(json.dumps([needed, compilations]))


if __name__ == "__main__":
    main(*sys.argv[1:])
