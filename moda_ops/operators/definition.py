"""torch.ops.moda.*: schemas, shape rules, autograd, and where each device's code lives.

Depth travels as a list: L slots (B, T, H, D), or a list of one packed tensor (B, T, L, H, D). CPU
tensors run ``eager`` beside this file; CUDA tensors run the Triton kernels of ``moda_kernels``,
imported by the first such call.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops.operators import eager
from moda_ops.operators.checks import check_attention, check_backward, lse_dtype
from moda_ops.rules import autograd

LIBRARY = torch.library.Library("moda", "DEF")  # the registrations live as long as this object
OPTIONS = (
    "*, bool causal=True, Scalar? scale=None, SymInt? window_left=None, SymInt? window_right=None, "
    "Scalar? softcap=None, str plan='auto'"
)
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] k_depth, Tensor[] v_depth, "
    f"{OPTIONS}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    f"Tensor[] k_depth, Tensor[] v_depth, Tensor out, Tensor lse, {OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dk_depth, Tensor[] dv_depth)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class Options(NamedTuple):
    """The keyword-only tail of the schemas, as the caller gave it; some have not all of it.

    Keyword-only because the dispatcher drops positional arguments that equal their defaults, and
    register_autograd then refuses the gradients of an op with Tensor[] arguments.
    """

    causal: bool = True
    scale: float | None = None
    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    plan: str = "auto"

    def resolved(self, head_dim: int) -> tuple[float, int | None, int | None, float | None, str]:
        """(scale, left, right, softcap, plan) as implementations take them: causal is right = 0."""
        scale = 1 / math.sqrt(head_dim) if self.scale is None else float(self.scale)
        softcap = None if self.softcap is None else float(self.softcap)
        right = 0 if self.causal else self.window_right
        return scale, self.window_left, right, softcap, self.plan


def implementation(q: Tensor) -> Any:
    """The module whose functions run for q's device."""
    if q.device.type == "cpu":
        return eager
    import moda_kernels

    return moda_kernels


def empty_like(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous tensors of the same shapes and dtypes."""
    return [x.new_empty(x.shape) for x in tensors]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    opts = Options(**options)
    check_attention(q, k, v, k_depth, v_depth, opts)
    return implementation(q).attention(q, k, v, k_depth, v_depth, *opts.resolved(q.shape[-1]))


def attention_fake(
    q: Tensor, k: Tensor, v: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, k_depth, v_depth, Options(**options))
    B, T, HQ, _ = q.shape
    return q.new_empty(B, T, HQ, v.shape[-1]), q.new_empty(B, HQ, T, dtype=lse_dtype(q))


def _attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    opts = Options(**options)
    check_attention(q, k, v, k_depth, v_depth, opts)
    check_backward(dout, dlse, out, lse, q, v)
    dout = torch.zeros_like(out) if dout is None else dout
    return implementation(q).attention_backward(
        dout, dlse, q, k, v, k_depth, v_depth, out, lse, *opts.resolved(q.shape[-1])
    )


def attention_backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    check_attention(q, k, v, k_depth, v_depth, Options(**options))
    check_backward(dout, dlse, out, lse, q, v)
    dq, dk, dv = empty_like([q, k, v])
    return dq, dk, dv, empty_like(k_depth), empty_like(v_depth)


def register(
    name: str,
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
) -> None:
    """Implement ``moda::name(inputs, *, options) -> (out, lse)`` and its gradient,
    ``moda::name_backward(dout, dlse, inputs, out, lse, *, options)``. Inputs are tensors and lists
    of tensors; the gradients of the first of them come back in their form, and the rest have none.
    """
    for op, kernel, fake in (
        (name, forward, forward_fake),
        (f"{name}_backward", backward, backward_fake),
    ):
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(op, kernel, device)
        torch.library.register_fake(f"moda::{op}", fake, lib=LIBRARY)

    def setup_context(
        ctx: Any, inputs: list[Any], options: dict[str, Any], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.inputs, ctx.options = autograd.lengths(inputs), options
        ctx.save_for_backward(*autograd.flatten(inputs), *output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        *saved, out, lse = ctx.saved_tensors
        inputs = autograd.unflatten(saved, ctx.inputs)
        op = getattr(torch.ops.moda, f"{name}_backward")
        grads = op(dout, dlse, *inputs, out, lse, **ctx.options)
        return *grads, *[None] * (len(inputs) - len(grads))

    autograd.register_autograd(LIBRARY, name, differentiate, setup_context)
    autograd.register_autograd(LIBRARY, f"{name}_backward", autograd.no_derivative(name))


register("attention", _attention, attention_fake, _attention_backward, attention_backward_fake)
