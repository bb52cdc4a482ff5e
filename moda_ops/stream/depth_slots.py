"""The depth stream of a forward pass as a list of slots: the functional path."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from moda_ops import private
from moda_ops.operators.arguments import Window, check_tensors
from moda_ops.operators.attention import moda_attention
from moda_ops.operators.attention_varlen import moda_attention_varlen
from moda_ops.operators.checks import Plan, check_both
from moda_ops.operators.depth_attention import moda_depth_attention
from moda_ops.operators.other_names import knows_other_names
from moda_ops.stream.arguments import check_kept, document_bounds
from moda_ops.stream.checkpointing import REENTRANT, in_reentrant_forward
from moda_ops.stream.checks import EMPTY_STREAM

_without_gradient = WeakTensorKeyDictionary()
"""The keys that a reentrant checkpoint wrote to a DepthSlots in its pass without gradients."""


class DepthSlots(NamedTuple):
    """A depth stream as a list: every slot is the tensor that its layer made, nothing is copied.

    The functional path: :func:`moda_attention` with its list of slots behind the interface of
    :class:`moda_ops.DepthStream`. Any number of slots, no preallocation, and no rule to keep. But
    the gradients of a slot's readers are added up outside the kernels, L (L - 1) additions for L
    layers, and a compiled block recompiles for every number of slots.

    Attributes:
        k: keys (B, T, H, D) of each slot.
        v: values (B, T, H, DV) of each slot.

    Example:
        >>> stream, x = DepthSlots(), torch.randn(2, 16, 4, 32, requires_grad=True)
        >>> for layer in range(3):
        ...     stream = stream.write(x[:, :, :2].sin(), x[:, :, :2].cos())
        ...     x, stream = stream.attend(x)
        >>> x.shape, stream.written
        (torch.Size([2, 16, 4, 32]), 3)
    """

    k: tuple[Tensor, ...] = ()
    v: tuple[Tensor, ...] = ()

    def __repr__(self) -> str:
        if not self.k:
            return "DepthSlots(written=0)"
        if not isinstance(self.k[-1], Tensor):
            return f"DepthSlots{tuple(self)}"
        k, v = (f"{name}={tuple(x.shape)}" for name, x in (("k", self.k[-1]), ("v", self.v[-1])))
        x = self.k[-1]
        return f"DepthSlots(written={self.written}, {k}, {v}, dtype={x.dtype}, device='{x.device}')"

    @property
    def written(self) -> int:
        """How many slots are written."""
        return len(self.k)

    def write(self, k: Tensor, v: Tensor) -> "DepthSlots":
        """The stream with one more slot: k (B, T, H, D) and v (B, T, H, DV)."""
        check_tensors(k=k, v=v)
        self._check_reentrant()
        if not torch.is_grad_enabled():
            k, v = k.detach(), v.detach()  # as a write into a buffer does
        eager = not torch.compiler.is_compiling()
        if eager and not torch.is_grad_enabled() and in_reentrant_forward():
            _without_gradient[k] = True
        return DepthSlots((*self.k, k), (*self.v, v))

    def _check_reentrant(self) -> None:
        """Raise RuntimeError where a slot should have a gradient that a checkpoint has dropped."""
        if torch.compiler.is_compiling() or not (_without_gradient and torch.is_grad_enabled()):
            return
        if any(k in _without_gradient and not k.requires_grad for k in self.k):
            raise RuntimeError(REENTRANT)

    def keep(self, slots: Sequence[int]) -> "DepthSlots":
        """The stream without all other slots; see :meth:`moda_ops.DepthStream.keep`.

        A dropped slot is freed with the last that refers to it: at once, or, in training, when
        backward has passed the layers that read it. Where the newest slot is dropped, the newest of
        the others is the sequence that ``attend`` takes.
        """
        check_kept(slots, self.written)
        return DepthSlots(tuple(self.k[i] for i in slots), tuple(self.v[i] for i in slots))

    @knows_other_names
    def attend(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        plan: Plan = "auto",
        cu_seqlens: tuple[Tensor, Tensor] | None = None,
    ) -> "tuple[Tensor, DepthSlots]":
        """``out`` (B, T, HQ, DV) and the stream; see :meth:`moda_ops.DepthStream.attend`."""
        options: Any = dict(causal=causal, scale=scale, window=window, softcap=softcap, plan=plan)
        out, _ = self._attend(q, k, v, cu_seqlens, **options)
        return out, self

    @knows_other_names
    def attend_with_lse(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        causal: bool = True,
        scale: float | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        plan: Plan = "auto",
        cu_seqlens: tuple[Tensor, Tensor] | None = None,
    ) -> "tuple[Tensor, Tensor, DepthSlots]":
        """:meth:`attend`, and ``lse`` (B, HQ, T) before the stream."""
        options: Any = dict(causal=causal, scale=scale, window=window, softcap=softcap, plan=plan)
        return *self._attend(q, k, v, cu_seqlens, **options), self

    def _attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cu_seqlens: tuple[Tensor, Tensor] | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        self._check_reentrant()
        check_both("k", k, "v", v)
        k_depth, v_depth = list(self.k), list(self.v)
        if k is None or v is None:
            if not self.k:
                raise ValueError(EMPTY_STREAM)
            k, v = k_depth.pop(), v_depth.pop()
        packed = document_bounds(cu_seqlens)
        if not packed:
            return moda_attention(q, k, v, k_depth, v_depth, **options, return_lse=True)
        check_tensors(q=q)
        if q.shape[0] != 1:
            raise ValueError(f"packed documents need a batch of B = 1, got B = {q.shape[0]}")
        q, k, v, *depth = (x.squeeze(0) for x in (q, k, v, *k_depth, *v_depth))
        k_depth, v_depth = depth[: len(k_depth)], depth[len(k_depth) :]
        out, lse = moda_attention_varlen(
            q, k, v, k_depth, v_depth, *packed, **options, return_lse=True
        )
        return out.unsqueeze(0), lse.unsqueeze(0)

    def keys(self) -> list[Tensor]:
        """The keys (B, T, H, D) of every slot that is there."""
        return list(self.k)

    @property
    def value_dim(self) -> int:
        """DV, of values."""
        if not self.v:
            raise ValueError("value_dim is not known before the first slot is written")
        return self.v[0].shape[-1]

    @knows_other_names
    def attend_sequence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        window: Window | None = None,
        softcap: float | None = None,
        plan: Plan = "auto",
    ) -> "tuple[Tensor, DepthSlots]":
        """``out`` without depth; see :meth:`moda_ops.DepthStream.attend_sequence`."""
        options: Any = dict(causal=causal, scale=scale, window=window, softcap=softcap, plan=plan)
        return moda_attention(q, k, v, [], [], **options), self

    @knows_other_names
    def attend_depth(
        self, q: Tensor, *, scale: float | None = None, softcap: float | None = None
    ) -> "tuple[Tensor, DepthSlots]":
        """``out`` of depth alone; see :meth:`moda_ops.DepthStream.attend_depth`."""
        self._check_reentrant()
        k, v = list(self.k), list(self.v)
        return moda_depth_attention(q, k, v, scale=scale, softcap=softcap), self


# For torch.export.save and load.
private.register_namedtuple(DepthSlots, serialized_type_name="moda_ops.DepthSlots")
torch.serialization.add_safe_globals([DepthSlots])
