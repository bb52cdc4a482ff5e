"""Gradient formulas of the operators, for autograd and for ``torch.func``.

What ``torch.library.register_autograd`` does, and two things that it does not (PyTorch issues
168393, 170834 and 179652): ``torch.func.grad`` and all that stands on it work, and a forward-mode
derivative is an error instead of nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch.autograd import Function, forward_ad

from moda_ops import private

Lengths = list[int | None]


class _Call(NamedTuple):
    """What a call consists of beside its flattened arguments, and how its results are nested."""

    keyset: Any
    options: dict[str, Any]
    inputs: Lengths
    results: Lengths
    outer: bool


def _of_tensors(x: Any) -> bool:
    return isinstance(x, list) and not (x and isinstance(x[0], (int, torch.SymInt)))


def lengths(arguments: Iterable[Any]) -> Lengths:
    """How many tensors each list of them among the arguments holds; None for all else."""
    return [len(x) if _of_tensors(x) else None for x in arguments]


def flatten(arguments: Iterable[Any]) -> list[Any]:
    """The arguments with the lists of tensors among them opened."""
    return list(chain.from_iterable(x if _of_tensors(x) else (x,) for x in arguments))


def unflatten(flat: Iterable[Any], form: Lengths) -> list[Any]:
    """The inverse of ``flatten`` for arguments of these ``lengths``."""
    rest = iter(flat)
    return [next(rest) if n is None else list(islice(rest, n)) for n in form]


def register_autograd(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., tuple[Any, ...]],
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Give ``moda::name`` a gradient.

    ``setup_context(ctx, inputs, options, output)`` sees all positional arguments and the options
    that were given; ``backward(ctx, *gradients)`` returns a gradient or None for each of these
    inputs, a list for a list.
    """
    op = getattr(torch.ops.moda, name).default
    defaults = [a.default_value for a in op._schema.arguments if not a.kwarg_only]

    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            f"moda::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors); "
            "use reverse mode: torch.func.vjp, torch.func.jacrev or backward()"
        )

    def forward(ctx: Any, call: _Call, *flat: Any) -> tuple[Any, ...]:
        inputs = unflatten(flat, call.inputs)
        keyset = call.keyset & private.after_autograd_keys
        # A Function runs without gradients; an outer transform of torch.func needs its own.
        with (
            torch.set_grad_enabled(call.outer),
            private.set_forward_grad_enabled(call.outer),
            private.BelowAutograd(),
        ):
            output = op.redispatch(keyset, *inputs, **call.options)
            if setup_context is not None:
                setup_context(ctx, inputs, call.options, output)
        results = output if isinstance(output, tuple) else (output,)
        call.results.extend(lengths(results))
        ctx.results = call.results
        return tuple(flatten(results))

    def differentiate(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *flatten(backward(ctx, *unflatten(gradients, ctx.results)))

    formula: Any = type(
        f"moda_{name}",
        (Function,),
        dict(
            forward=staticmethod(forward),
            backward=staticmethod(differentiate),
            jvp=staticmethod(jvp),
        ),
    )

    apply = super(Function, formula).apply  # Function's own refuses transforms of torch.func

    def autograd(keyset: Any, *inputs: Any, **options: Any) -> Any:
        needed = torch.is_grad_enabled() and private.any_requires_grad(*inputs)
        if not needed and private.forward_mode_level() < 0:
            with private.BelowAutograd():
                return op.redispatch(keyset & private.after_autograd_keys, *inputs, **options)
        inputs = (*inputs, *defaults[len(inputs) :])  # the dispatcher drops arguments at defaults
        outer = private.transforms_active()
        call = _Call(keyset, options, lengths(inputs), [], outer)
        with private.single_level_function():
            flat = apply(call, *flatten(inputs))
        results = unflatten(flat, call.results)
        return tuple(results) if len(results) > 1 else results[0]

    library.impl(name, autograd, "Autograd", with_keyset=True)


def no_derivative(name: str) -> Callable[..., Any]:
    """A ``backward`` for ``moda::name_backward``, which says that there is none."""

    def backward(ctx: Any, *gradients: Sequence[Any]) -> Any:
        raise NotImplementedError(f"moda::{name} has no second derivative (create_graph=True)")

    return backward


def without_gradient(library: torch.library.Library, name: str) -> None:
    """Let the results of ``moda::name`` require no gradient, whatever its arguments do."""
    op = getattr(torch.ops.moda, name).default

    def autograd(keyset: Any, *inputs: Any, **options: Any) -> Any:
        with private.BelowAutograd():
            return op.redispatch(keyset & private.after_autograd_keys, *inputs, **options)

    library.impl(name, autograd, "Autograd", with_keyset=True)


def refuse_gradients(library: torch.library.Library, name: str, message: str) -> None:
    """Let ``moda::name`` raise RuntimeError, before it runs, for inputs that need a derivative.

    ``message`` has a place, ``{}``, for the argument's name.
    """
    op = getattr(torch.ops.moda, name).default

    def needs_derivative(x: Any) -> bool:
        if torch.is_grad_enabled() and x.requires_grad:
            return True
        return private.forward_mode_level() >= 0 and forward_ad.unpack_dual(x).tangent is not None

    def autograd(keyset: Any, *inputs: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() or private.forward_mode_level() >= 0:
            for argument, given in zip(op._schema.arguments, inputs, strict=False):
                tensors = flatten([given])
                if any(isinstance(x, torch.Tensor) and needs_derivative(x) for x in tensors):
                    raise RuntimeError(message.format(argument.name))
        with private.BelowAutograd():
            return op.redispatch(keyset & private.after_autograd_keys, *inputs, **options)

    library.impl(name, autograd, "Autograd", with_keyset=True)
