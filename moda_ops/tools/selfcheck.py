"""The operator against the NumPy reference, with a tolerance that is derived and not tuned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moda_ops.operators.attention import moda_attention

Array = npt.NDArray[Any]
RESULTS = ("out", "lse", "dq", "dk", "dv", "dk_depth", "dv_depth")


class Error(NamedTuple):
    """Relative error of one result in the Euclidean norm, and what is allowed.

    ``tolerance`` is twice the error of a plain PyTorch evaluation in the same dtype, plus one
    rounding step of that dtype, plus what float32 scores amount to: p = exp(score - lse), so that
    rounding numbers as large as the largest lse changes p by eps |lse|, relatively.
    """

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        return f"{self.name} {self.error:.1e} (tolerance {self.tolerance:.1e})"


def operator_errors(
    q: Tensor, k: Tensor, v: Tensor, k_depth: list[Tensor], v_depth: list[Tensor]
) -> list[Error]:
    """Errors of the causal operator, forward and backward, against ``moda_reference`` in float64.

    Args:
        q: (B, T, HQ, D).
        k: (B, T, H, D).
        v: (B, T, H, DV).
        k_depth: at least one slot (B, T, H, D).
        v_depth: as many slots (B, T, H, DV).

    Returns:
        One :class:`Error` for each of RESULTS; all slots count as one result.
    """
    import moda_reference

    inputs = [x.detach() for x in (q, k, v, torch.stack(k_depth, 2), torch.stack(v_depth, 2))]
    generator = np.random.default_rng(0)
    dout = torch.from_numpy(generator.standard_normal((*q.shape[:3], v.shape[-1]))).to(q)
    dlse = torch.from_numpy(generator.standard_normal((q.shape[0], q.shape[2], q.shape[1]))).to(q)

    def arrays(*tensors: Tensor) -> list[Array]:
        return [x.detach().double().cpu().numpy() for x in tensors]

    def evaluate(attention: Callable[..., tuple[Tensor, Tensor]]) -> list[Array]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = attention(*leaves)
        return arrays(out, lse, *torch.autograd.grad([out, lse], leaves, [dout, dlse.to(lse)]))

    exact_inputs, (exact_dout, exact_dlse) = arrays(*inputs), arrays(dout, dlse)
    exact: list[Any] = [
        *moda_reference.attention(*exact_inputs),
        *moda_reference.attention_backward(exact_dout, *exact_inputs, dlse=exact_dlse),
    ]

    def distances(results: list[Array]) -> list[float]:
        norm = np.linalg.norm
        return [float(norm(a - b) / norm(b)) for a, b in zip(results, exact, strict=True)]

    rounding = torch.finfo(q.dtype).eps + torch.finfo(torch.float32).eps * np.abs(exact[1]).max()
    return [
        Error(name, error, 2 * plain_error + rounding)
        for name, error, plain_error in zip(
            RESULTS, distances(evaluate(_operator)), distances(evaluate(_plain)), strict=True
        )
    ]


def _operator(
    q: Tensor, k: Tensor, v: Tensor, k_depth: Tensor, v_depth: Tensor
) -> tuple[Tensor, Tensor]:
    return moda_attention(q, k, v, k_depth.unbind(2), v_depth.unbind(2), return_lse=True)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, k_depth: Tensor, v_depth: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by dense PyTorch calls in q's dtype; depth is packed, (B, T, L, H, D)."""
    (T, HQ, D), H = q.shape[1:], k.shape[2]
    k, v, k_depth, v_depth = (x.repeat_interleave(HQ // H, -2) for x in (k, v, k_depth, v_depth))
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    sequence = torch.einsum("bthd,bnhd->bhtn", q, k).masked_fill(hidden, -torch.inf)
    depth = torch.einsum("bthd,btlhd->bhtl", q, k_depth)
    scores = torch.cat((sequence, depth), -1) * D**-0.5
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - lse[..., None])
    out = torch.einsum("bhtn,bnhd->bthd", p[..., :T], v)
    return out + torch.einsum("bhtl,btlhd->bthd", p[..., T:], v_depth), lse
