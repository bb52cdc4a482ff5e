"""One description for each operator that attends; its backward operator follows from it.

Depth travels as a list: L slots (B, T, H, D), or a list of one packed tensor (B, T, L, H, D). CPU
tensors run ``eager`` beside this file; CUDA tensors run the Triton kernels of ``moda_kernels``,
imported by the first such call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops.operators import eager
from moda_ops.operators.checks import Sizes, check_backward, lse_dtype
from moda_ops.operators.options import OPTIONS, Options
from moda_ops.rules.autocast import Autocast
from moda_ops.rules.autograd import flatten as flatten_arguments
from moda_ops.rules.autograd import lengths, no_derivative, register_autograd, unflatten
from moda_ops.rules.flops import Pairs
from moda_ops.rules.operator import Operator, define
from moda_ops.rules.sharding import Sharding
from moda_ops.rules.vmap import Vmap

DEPTH = "Tensor[] k_depth, Tensor[] v_depth"


def implementation(q: Tensor) -> Any:
    """The module whose functions run for q's device."""
    if q.device.type == "cpu":
        return eager
    import moda_kernels

    return moda_kernels


class Attention(NamedTuple):
    """``moda::name(inputs, *, options) -> (out, lse)``, and ``moda::name_backward(dout, dlse,
    inputs, out, lse, *, options)``, which returns the gradients of the first inputs.

    Attributes:
        name: of the operator.
        inputs: their schema.
        trained: how many of them, from the first one on, have gradients.
        check: called with the inputs and :class:`Options`; raises, or returns the call's sizes.
        forward: called with the implementation, the inputs and the options.
        backward: called with the implementation, dout, dlse, inputs, out, lse and the options.
        pairs: see :class:`moda_ops.rules.operator.Operator`, as the rest.
        options: their schema.
        results: layouts of out and lse.
    """

    name: str
    inputs: str
    trained: int
    check: Callable[..., Sizes]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Sequence[Any]]
    pairs: Pairs
    sharding: Sharding
    vmap: Vmap = Vmap()
    options: str = OPTIONS
    results: tuple[str, str] = "B T HQ DV", "B HQ T"


def define_attention(a: Attention) -> None:
    """Define the operator and its backward operator."""

    def forward(*inputs: Any, **given: Any) -> tuple[Tensor, Tensor]:
        options = Options(**given)
        a.check(*inputs, options)
        return a.forward(implementation(inputs[0]), *inputs, options)

    def forward_fake(*inputs: Any, **given: Any) -> tuple[Tensor, Tensor]:
        sizes, q = a.check(*inputs, Options(**given)), inputs[0]
        out, lse = map(sizes.shape, a.results)
        return q.new_empty(out), q.new_empty(lse, dtype=lse_dtype(q))

    def check(dout: Any, dlse: Any, arguments: Any, given: Any) -> tuple[Any, Options]:
        *inputs, out, lse = arguments
        options = Options(**given)
        check_backward(a.check(*inputs, options), a.results, dout, dlse, out, lse)
        return inputs, options

    def backward(dout: Tensor | None, dlse: Tensor | None, *arguments: Any, **given: Any) -> Any:
        (q, *_), options = check(dout, dlse, arguments, given)
        dout = torch.zeros_like(arguments[-2]) if dout is None else dout
        return a.backward(implementation(q), dout, dlse, *arguments, options)

    def backward_fake(dout: Any, dlse: Any, *arguments: Any, **given: Any) -> Any:
        inputs, _ = check(dout, dlse, arguments, given)
        return tuple(
            [y.new_empty(y.shape) for y in x] if isinstance(x, list) else x.new_empty(x.shape)
            for x in inputs[: a.trained]
        )

    def setup_context(ctx: Any, inputs: list[Any], given: dict[str, Any], output: Any) -> None:
        ctx.inputs, ctx.options = lengths(inputs), given
        ctx.save_for_backward(*flatten_arguments(inputs), *output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        *saved, out, lse = ctx.saved_tensors
        inputs = unflatten(saved, ctx.inputs)
        operator = getattr(torch.ops.moda, f"{a.name}_backward")
        grads = operator(dout, dlse, *inputs, out, lse, **ctx.options)
        return *grads, *[None] * (len(inputs) - len(grads))

    trained = [argument.split() for argument in a.inputs.split(", ")[: a.trained]]
    grads = ", ".join(f"{kind} d{name}" for kind, name in trained)
    rules: dict[str, Any] = dict(vmap=a.vmap, pairs=a.pairs, sharding=a.sharding)
    formula = partial(register_autograd, backward=differentiate, setup_context=setup_context)
    define(
        Operator(
            f"{a.name}({a.inputs}, {a.options}) -> (Tensor out, Tensor lse)",
            forward,
            forward_fake,
            formula,
            Autocast(),
            **rules,
        )
    )
    define(
        Operator(
            f"{a.name}_backward(Tensor? dout, Tensor? dlse, {a.inputs}, Tensor out, Tensor lse, "
            f"{a.options}) -> ({grads})",
            backward,
            backward_fake,
            partial(register_autograd, backward=no_derivative(a.name)),
            **rules,
        )
    )
