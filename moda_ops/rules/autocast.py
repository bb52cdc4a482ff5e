"""What ``torch.autocast`` does to the operators: what it does to scaled_dot_product_attention.

Floating-point arguments on the device, except float64, are cast to autocast's dtype, lists tensor
by tensor, and so are the results. Integer tensors stay as they are. The gradients come back in the
dtypes of the arguments, for the casts are part of the graph.

An operator that has memory, a cache or a stream's buffer, computes in the memory's dtype: casting
the memory would copy all of it, and lose what is written to it. ``lse`` is a result of attention,
which has its dtype whatever autocast says. Backward operators have no rule; they take what the
forward has saved.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops import private


class Autocast(NamedTuple):
    """Arguments that are not cast; all others are."""

    memory: tuple[str, ...] = ()
    """The first of these has the dtype for the others, in place of autocast's."""
    as_given: tuple[str, ...] = ()


def enabled(device: torch.device) -> bool:
    """Whether autocast casts tensors there; PyTorch raises on meta, where it has no autocast."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a layer computes in: autocast's where that applies, else its input's."""
    if dtype is not torch.float64 and enabled(device):
        return torch.get_autocast_dtype(device.type)
    return dtype


def _cast(x: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(x, list):
        return [_cast(tensor, device, dtype) for tensor in x]
    if not isinstance(x, Tensor) or x.device.type != device:
        return x
    return x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x


def register(library: torch.library.Library, name: str, rule: Autocast) -> None:
    """Let autocast, on either device, cast the arguments of ``moda::name``."""
    for device in ("cpu", "cuda"):
        _register(library, name, rule, device)


def _register(library: torch.library.Library, name: str, rule: Autocast, device: str) -> None:
    op = getattr(torch.ops.moda, name).default
    names = [argument.name for argument in op._schema.arguments]
    memory = names.index(rule.memory[0]) if rule.memory else None
    kept = [names.index(argument) for argument in (*rule.memory, *rule.as_given)]
    key = f"Autocast{device.upper()}"
    below = private.DispatchKeySet(getattr(private.DispatchKey, key))

    def autocast(*arguments: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device) if memory is None else arguments[memory].dtype
        arguments = tuple(
            x if i in kept else _cast(x, device, dtype) for i, x in enumerate(arguments)
        )
        with private.ExcludeKeys(below):
            return op(*arguments, **options)

    library.impl(name, autocast, key)
