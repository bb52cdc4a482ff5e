"""What ``torch.vmap`` does to the operators: the mapped dimension becomes part of the batch.

One call does the work of all. A mapped argument is viewed, or copied where its strides allow no
view; one that is not mapped is repeated, which is free for a batch of 1.

``torch.autograd.grad(..., is_grads_batched=True)``, and ``jacobian(vectorize=True)`` on it, map a
backward pass with an older vmap, which has a dispatch key and tensors of its own. The same rules
serve it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops import private
from moda_ops.rules.autograd import flatten


class Mapped(NamedTuple):
    """An argument and its mapped dimension, None if there is none; lists of both for a list."""

    value: Any
    dim: Any


Arguments = dict[str, Mapped]


def mapped_rows(x: Mapped, size: int, axis: int = 0) -> Tensor:
    """The mapped dimension, or ``size`` copies, before ``axis``."""
    if x.dim is not None:
        return x.value.movedim(x.dim, axis)
    return x.value.unsqueeze(axis).expand(*x.value.shape[:axis], size, *x.value.shape[axis:])


def fold(x: Mapped, size: int, axis: int) -> Any:
    """The mapped dimension as part of ``axis``, and stride 1 in the last dimension."""
    if isinstance(x.value, list):
        return [fold(Mapped(*pair), size, axis) for pair in zip(*x, strict=True)]
    if x.value is None:
        return None
    folded = mapped_rows(x, size, axis).flatten(axis, axis + 1)
    return folded if folded.stride(-1) == 1 else folded.contiguous()


def _unfold(x: Any, size: int, axis: int, first: int) -> Any:
    """The ``first`` rows of a mapped dimension that is part of ``axis``."""
    if isinstance(x, list):
        return [_unfold(tensor, size, axis, first) for tensor in x]
    return x.unflatten(axis, (size, x.shape[axis] // size)).narrow(axis, 0, first)


def _one_row(x: Mapped) -> Mapped:
    """A dimension of size 0 filled up to 1 with zeros, through which gradients pass."""
    if isinstance(x.value, list):
        filled = [_one_row(Mapped(*pair)) for pair in zip(*x, strict=True)]
        return Mapped([one.value for one in filled], [one.dim for one in filled])
    if x.dim is None:
        return x
    rows = x.value.movedim(x.dim, 0)
    return Mapped(torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]), 0)


class Vmap(NamedTuple):
    """How a mapped dimension becomes part of the batch.

    Attributes:
        axes: of an argument or a result, the axis that it becomes part of; 0 unless named.
        special: folds the arguments that need more than that; called with all and the size.
    """

    axes: dict[str, int] = {}  # noqa: RUF012  # nobody writes to it
    special: Callable[[Arguments, int], dict[str, Any]] | None = None


def register(library: torch.library.Library, name: str, rule: Vmap | str) -> None:
    """Let ``torch.vmap`` map ``moda::name``, or let it raise with this reason."""
    if isinstance(rule, str):
        _refuse(library, name, rule)
    else:
        _register(library, name, rule)


def _register(library: torch.library.Library, name: str, rule: Vmap) -> None:
    op, (axes, special) = getattr(torch.ops.moda, name).default, rule
    names = [argument.name for argument in op._schema.arguments]
    results = [result.name for result in op._schema.returns]
    dims = [axes.get(result, 0) for result in results]

    def run(size: int, in_dims: Any, values: Any, options: dict[str, Any]) -> list[Any]:
        """The results, each with its mapped dimension where ``dims`` says."""
        arguments = dict(zip(names, map(Mapped, values, in_dims), strict=False))
        if empty := size == 0:
            size, arguments = 1, {name: _one_row(x) for name, x in arguments.items()}
        folded = {} if special is None else special(arguments, size)
        for argument, given in arguments.items():
            if argument not in folded:
                x = fold(given, size, axes.get(argument, 0))
                saved = argument in ("out", "lse")  # which the operators want contiguous
                folded[argument] = x.contiguous() if saved else x
        outputs = op(*(folded[argument] for argument in arguments), **options)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        first = 0 if empty else size
        return [_unfold(x, size, dim, first) for x, dim in zip(outputs, dims, strict=True)]

    def mapped(info: Any, in_dims: Any, *values: Any, **options: Any) -> tuple[Any, Any]:
        outputs = run(info.batch_size, in_dims, values, options)
        if len(dims) == 1:
            return outputs[0], dims[0]
        out_dims = [
            [dim] * len(x) if isinstance(x, list) else dim
            for x, dim in zip(outputs, dims, strict=True)
        ]
        return tuple(outputs), tuple(out_dims)

    def batched_gradients(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        level = private.leave_vmap_level() + 1  # outside it, tensors are plain
        try:
            rows = [_exposed(x, level) for x in arguments]
            sizes = {x.shape[0] for x in flatten(rows) if x is not None} - {1}
            size = sizes.pop() if sizes else 1
            values, in_dims = zip(*(_of_size(x, size) for x in rows), strict=True)
            outputs = run(size, in_dims, values, options)
            return tuple(_hidden(x, dim, level) for x, dim in zip(outputs, dims, strict=True))
        finally:
            private.enter_vmap_level()

    torch.library.register_vmap(f"moda::{name}", mapped, lib=library)
    if name.endswith("_backward"):
        library.impl(name, batched_gradients, "Batched")


def _exposed(x: Any, level: int) -> Any:
    """A tensor of the older vmap with its mapped dimension first; of size 1 if it has none."""
    if isinstance(x, list):
        return [_exposed(tensor, level) for tensor in x]
    return None if x is None else private.remove_batch_dim(x, level, 1, 0)


def _of_size(x: Any, size: int) -> Mapped:
    """Exposed tensors: those that have this size are mapped."""
    if isinstance(x, list):
        pairs = [_of_size(tensor, size) for tensor in x]
        return Mapped([pair.value for pair in pairs], [pair.dim for pair in pairs])
    if x is None:
        return Mapped(None, None)
    return Mapped(x, 0) if x.shape[0] == size else Mapped(x[0], None)


def _hidden(x: Any, dim: int, level: int) -> Any:
    if isinstance(x, list):
        return [_hidden(tensor, dim, level) for tensor in x]
    return private.add_batch_dim(x, dim, level)


def _refuse(library: torch.library.Library, name: str, reason: str) -> None:
    def refusal(how: str) -> Callable[..., Any]:
        def rule(*arguments: Any, **options: Any) -> Any:
            raise NotImplementedError(f"moda::{name} cannot be mapped by {how}: {reason}")

        return rule

    torch.library.register_vmap(f"moda::{name}", refusal("torch.vmap"), lib=library)
    library.impl(name, refusal("is_grads_batched"), "Batched")
