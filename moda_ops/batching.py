"""What ``torch.vmap`` does to the operators: the mapped dimension becomes part of the batch.

One call does the work of all. A mapped argument is viewed, or copied where its strides allow no
view; one that is not mapped is repeated, which is free for a batch of 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops.ops import LIBRARY


class Mapped(NamedTuple):
    """An argument and its mapped dimension, None if there is none; lists of both for a list."""

    value: Any
    dim: Any


Arguments = dict[str, Mapped]


def _rows(x: Mapped, size: int, axis: int = 0) -> Tensor:
    """The mapped dimension, or ``size`` copies, before ``axis``."""
    if x.dim is not None:
        return x.value.movedim(x.dim, axis)
    return x.value.unsqueeze(axis).expand(*x.value.shape[:axis], size, *x.value.shape[axis:])


def _fold(x: Mapped, size: int, axis: int) -> Any:
    """The mapped dimension as part of ``axis``, and stride 1 in the last dimension."""
    if isinstance(x.value, list):
        return [_fold(Mapped(*pair), size, axis) for pair in zip(*x, strict=True)]
    if x.value is None:
        return None
    folded = _rows(x, size, axis).flatten(axis, axis + 1)
    return folded if folded.stride(-1) == 1 else folded.contiguous()


def _unfold(x: Any, size: int, axis: int) -> Any:
    if isinstance(x, list):
        return [_unfold(tensor, size, axis) for tensor in x]
    return x.unflatten(axis, (size, x.shape[axis] // size))


def _documents(arguments: Arguments, size: int) -> dict[str, Any]:
    """Where the documents of all packed sequences begin, once these stand one after the other.

    A sequence's tokens before its first document become two documents of their own, one of queries
    alone and one of keys alone, which see nothing of each other, nor of another sequence. So do
    those after its last document.
    """
    totals = {}
    for side, tokens in (("q", arguments["q"]), ("k", arguments["k"])):
        shape = list(tokens.value.shape)
        if tokens.dim is not None:
            shape.pop(tokens.dim)
        totals[side] = shape[0]
    starts = {side: _rows(arguments[f"cu_seqlens_{side}"], size) for side in totals}
    zero = starts["k"].new_zeros(size, 1)
    first = {"q": starts["q"][:, :1], "k": zero}  # queries alone, then keys alone
    last = {"q": zero + totals["q"], "k": starts["k"][:, -1:]}  # the same
    folded = {}
    for side, total in totals.items():
        offset = torch.arange(size, device=starts[side].device, dtype=torch.int32) * total
        begins = torch.cat([zero, first[side], starts[side], last[side]], 1) + offset[:, None]
        end = begins.new_full((1,), size * total)
        folded[f"cu_seqlens_{side}"] = torch.cat([begins.flatten(), end])
    return folded


def _pages(arguments: Arguments, size: int) -> dict[str, Any]:
    """Pages that are not mapped serve all; of mapped ones, the tables count through all."""
    caches = {name: arguments[name] for name in ("k_cache", "v_cache")}
    table = arguments.get("block_table", Mapped(None, None))
    if table.value is None:
        return {}
    if all(cache.dim is None for cache in caches.values()):
        return {name: cache.value for name, cache in caches.items()}
    folded = {name: _fold(cache, size, 0) for name, cache in caches.items()}
    pages = folded["k_cache"].shape[0] // size
    first = torch.arange(size, device=table.value.device, dtype=torch.int32) * pages
    ids = _rows(table, size)
    ids = (ids + first[:, None, None]).where((ids >= 0) & (ids < pages), -1)
    return folded | {"block_table": ids.flatten(0, 1)}


def _register(
    name: str, special: Callable[[Arguments, int], dict[str, Any]] | None, axes: dict[str, int]
) -> None:
    op = getattr(torch.ops.moda, name).default
    names = [argument.name for argument in op._schema.arguments]
    results = [result.name for result in op._schema.returns]

    def rule(info: Any, in_dims: Any, *values: Any, **options: Any) -> tuple[Any, Any]:
        size = info.batch_size
        arguments = dict(zip(names, map(Mapped, values, in_dims), strict=False))
        folded = {} if special is None else special(arguments, size)
        for argument, mapped in arguments.items():
            if argument not in folded:
                x = _fold(mapped, size, axes.get(argument, 0))
                saved = argument in ("out", "lse")  # which the operators want contiguous
                folded[argument] = x.contiguous() if saved else x
        outputs = op(*(folded[argument] for argument in arguments), **options)
        if isinstance(outputs, Tensor):
            return _unfold(outputs, size, 0), 0
        dims = [axes.get(result, 0) for result in results]
        outputs = tuple(_unfold(x, size, dim) for x, dim in zip(outputs, dims, strict=True))
        return outputs, tuple(
            [dim] * len(x) if isinstance(x, list) else dim
            for x, dim in zip(outputs, dims, strict=True)
        )

    torch.library.register_vmap(f"moda::{name}", rule, lib=LIBRARY)


def _refuse(name: str, reason: str) -> None:
    def rule(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        raise NotImplementedError(f"moda::{name} cannot be mapped by torch.vmap: {reason}")

    torch.library.register_vmap(f"moda::{name}", rule, lib=LIBRARY)


for _name, _special, _axes in (
    ("attention", None, {}),
    ("chunk_attention", None, {}),
    ("depth_attention", None, {}),
    ("attention_varlen", _documents, {"lse": 1, "dlse": 1}),
):
    _register(_name, _special, _axes)
    _register(f"{_name}_backward", _special, _axes)
_register("depth_mass", None, {})
_register("decode", _pages, {})
_refuse(
    "decode_", "it writes to its caches; append to them first and map moda_decode without k_new"
)
for _name in (
    "stream_buffer",
    "stream_write",
    "stream_read",
    "stream_attention",
    "stream_attention_backward",
):
    _refuse(_name, "a DepthStream is written in place; map over DepthSlots, or over moda_attention")
