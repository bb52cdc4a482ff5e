"""What ``torch.autocast`` does to the operators: what it does to scaled_dot_product_attention.

Floating-point arguments on the device, except float64, are cast to autocast's dtype, lists tensor
by tensor, and so are the results. Integer tensors stay as they are. The gradients come back in the
dtypes of the arguments, for the casts are part of the graph.

An operator that has memory, a cache or a stream's buffer, computes in the memory's dtype: casting
the memory would copy all of it, and lose what is written to it. Backward operators have no rule;
they take what the forward has saved.
"""

from typing import Any

import torch
from torch import Tensor

from moda_ops.ops import LIBRARY

MEMORY: dict[str, tuple[str, ...]] = {
    "attention": (),
    "attention_varlen": (),
    "chunk_attention": (),
    "depth_attention": (),
    "decode": ("k_cache", "v_cache"),
    "decode_": ("k_cache", "v_cache"),
    "stream_write": ("buffer", "token"),
    "stream_attention": ("buffer", "token"),
}
"""Which arguments are never cast, by operator; the first of them has the dtype for the others."""


def _cast(x: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(x, list):
        return [_cast(tensor, device, dtype) for tensor in x]
    if not isinstance(x, Tensor) or x.device.type != device:
        return x
    return x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x


def _register(name: str, memory: tuple[str, ...], device: str) -> None:
    op = getattr(torch.ops.moda, name).default
    names = [argument.name for argument in op._schema.arguments]
    kept = [names.index(argument) for argument in memory]
    key = f"Autocast{device.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(*arguments: Any, **options: Any) -> Any:
        dtype = arguments[kept[0]].dtype if kept else torch.get_autocast_dtype(device)
        arguments = tuple(
            x if i in kept else _cast(x, device, dtype) for i, x in enumerate(arguments)
        )
        with torch._C._ExcludeDispatchKeyGuard(below):
            return op(*arguments, **options)

    LIBRARY.impl(name, autocast, key)


for _name, _memory in MEMORY.items():
    for _device in ("cpu", "cuda"):
        _register(_name, _memory, _device)
