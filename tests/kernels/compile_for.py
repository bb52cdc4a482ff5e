"""Compile every kernel for a GPU that is not there. Print what shared memory each needs, in bytes,
how often they have been compiled after each of three lengths, and which strides they multiply in
32 bits.

    TRITON_INTERPRET=0 python compile_for.py CAPABILITY SHARED_MEMORY HEAD_DIM DTYPE G

The driver is a stand-in, tensors lie on the CPU, and nothing is launched.
"""

import importlib
import json
import pkgutil
import re
import sys
from typing import Any

from every_kernel import attention, decoding


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


def narrow_strides(ttir: str) -> set[str]:
    """Which of a kernel's strides are multiplied in 32 bits: such offsets overflow."""
    value = r"(%[\w#]+)"
    view = r"(?:tt\.splat|tt\.broadcast|tt\.expand_dims|arith\.\w*ext\w*)"
    same = re.findall(rf"{value} = {view} {value}", ttir)
    source = dict(same)
    found = set()
    for *factors, kind in re.findall(rf"= arith\.muli {value}, {value} : (\S+)", ttir):
        for factor in factors if re.search(r"\bi32|xi32", kind) else ():
            while factor in source:
                factor = source[factor]
            if "stride" in factor:
                found.add(factor.removeprefix("%"))
    return found


class Compiling:
    """Stands for a kernel: compiles where that would launch, and notes the shared memory."""

    def __init__(self, kernel: Any, needed: dict[str, int], narrow: set[str]) -> None:
        self.kernel, self.needed, self.narrow = kernel, needed, narrow
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        def compile(*arguments: Any, **constants: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **constants)
            name = self.kernel.fn.__name__
            self.needed[name] = max(self.needed.get(name, 0), compiled.metadata.shared)
            self.narrow.update(f"{name}: {x}" for x in narrow_strides(compiled.asm["ttir"]))

        return compile


def main(capability: str, shared_memory: str, head_dim: str, dtype: str, group: str) -> None:
    import torch
    import triton

    triton.runtime.driver.set_active(Driver(int(capability)))
    import moda_kernels
    from moda_kernels import sdpa, tuning

    kernels, needed, narrow = [], dict[str, int](), set[str]()
    for info in pkgutil.iter_modules(moda_kernels.__path__):
        module = importlib.import_module(f"moda_kernels.{info.name}")
        for name in [name for name in vars(module) if re.fullmatch("_moda_.*_kernel", name)]:
            kernels.append(getattr(module, name))
            setattr(module, name, Compiling(kernels[-1], needed, narrow))
    tuning.shared_memory = lambda device: int(shared_memory)
    by_library = sdpa.attention
    sdpa.attention = lambda *a: tuple(x.contiguous() for x in by_library(*a))  # as cuDNN does

    D, G = int(head_dim), int(group)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    compilations = []
    for T, L in ((64, 20), (17, 16), (1, 1)):
        for _ in attention(zeros, T, L, D, G):
            pass
        compilations.append(sum(len(kernel.device_caches[0][0]) for kernel in kernels))
    for _ in decoding(zeros, D, G):
        pass
    print(json.dumps([needed, compilations, sorted(narrow)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
