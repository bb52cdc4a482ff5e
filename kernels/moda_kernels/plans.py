"""Which kernels a pass runs: its plan.

"fused": Triton kernels of our own for sequence and depth. Forward is one kernel, under one online softmax, or, for
groups of which the depth's sums would cost too much in it (moda_kernels.tuning.forward_two_kernels), two.

"split": the sequence by a library (see moda_kernels.sdpa), depth by a streaming Triton kernel, which in
forward goes on from the library's out and lse. Backward hands the library the merged out and lse, so that its
probabilities are those of the one softmax: exact.

Both passes choose on their own, by the arithmetic of the sequence: a library is faster at it, while fusion saves
launches and passes over out and dq. "auto" splits for cuDNN alone, where that has been measured to be faster
(moda_kernels.tuning), and not for small gains: cuDNN takes about a tenth of a second to plan for a new shape.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moda_kernels import sdpa, tuning
from moda_kernels.launch import Problem


class Plan(NamedTuple):
    """``library`` runs the sequence of a split pass; None means fused. ``reason`` says why, for a reader."""

    library: str | None
    reason: str


def forward_plan(plan: str, p: Problem, q: Tensor, k: Tensor, v: Tensor, two_kernels: bool) -> Plan:
    """Raise ValueError if ``plan`` is "split" and this call cannot be. ``two_kernels``: a fused forward is two."""
    most = tuning.split_forward(p.G, p.D, p.DV, p.causal, two_kernels)
    chosen = _by_choice(plan, p, most) or _split(plan, p, q, k, v)
    if plan == "split" and chosen.library is None:
        raise ValueError(f"plan must be 'auto' or 'fused' for this call, got 'split': {chosen.reason}")
    return chosen


def backward_plan(plan: str, p: Problem, q: Tensor, k: Tensor, v: Tensor, dlse: Tensor | None) -> Plan:
    """Under "split", passes that a library cannot do are fused."""
    if chosen := _by_choice(plan, p, tuning.split_backward(p.G, p.D, p.DV, p.causal)):
        return chosen
    if dlse is not None:
        return Plan(None, "a library takes no gradient of lse")
    if torch.are_deterministic_algorithms_enabled():
        return Plan(None, "deterministic algorithms are asked for, and a library's backward is not one")
    if p.L and tuning.backward_depth_tile(q.dtype, p.G, p.D, p.DV).BLOCK_G < p.G:
        return Plan(None, f"at this head dim a group of {p.G} goes by in parts")
    return _split(plan, p, q, k, v)


def _by_choice(plan: str, p: Problem, most: float) -> Plan | None:
    if plan == "fused":
        return Plan(None, "as asked for")
    if plan == "auto" and p.flops <= most:
        return Plan(None, "too little arithmetic for a library to gain")
    return None


def _split(plan: str, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Plan:
    if p.varlen:
        return Plan(None, "packed documents are fused")
    if p.softcap is not None:
        return Plan(None, "a library has no softcap")
    if p.left is not None or p.right not in (None, 0):
        return Plan(None, "a library has no window")
    if p.causal and p.T != p.S:
        return Plan(None, f"a library's causal mask needs T = S, got T = {p.T} and S = {p.S}")
    if p.scale <= 0.0:
        return Plan(None, "a library's mask needs a positive scale")
    library_name = sdpa.select(q, k, v, p.causal)
    if library_name is None:
        return Plan(None, "no library takes tensors of this dtype, head dim or alignment")
    if plan == "auto" and library_name != "cudnn":
        return Plan(None, f"{library_name} has not been measured to be faster")
    return Plan(library_name, f"{library_name} covers it")
