"""What both depth streams accept beside tensors."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moda_ops.operators.arguments import check_tensors


def check_kept(slots: object, written: int) -> None:
    """Raise unless these are some of ``written`` slots, ascending."""
    if not isinstance(slots, Sequence) or any(
        isinstance(slot, bool) or not isinstance(slot, (int, torch.SymInt)) for slot in slots
    ):
        raise TypeError(f"slots must be a sequence of ints, got {slots!r}")
    if any(b <= a for a, b in pairwise(slots)):
        raise ValueError(f"slots must be ascending, got {list(slots)}")
    for slot in slots:
        if not 0 <= slot < written:
            allowed = f"within 0..{written - 1}" if written else "empty, because none is written"
            raise ValueError(f"slots must be {allowed}, got {slot}")


def document_bounds(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | tuple[()]:
    """The pair that says where packed documents begin; () for a batch. Raise for anything else."""
    if pair is None:
        return ()
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(
            "cu_seqlens must be None or a pair (cu_seqlens_q, cu_seqlens_k), got "
            f"{type(pair).__name__}"
        )
    check_tensors(cu_seqlens_q=pair[0], cu_seqlens_k=pair[1])
    return pair
