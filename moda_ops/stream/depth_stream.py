"""The depth stream of a forward pass in one buffer, which layers write in place."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops import private
from moda_ops.operators.arguments import (
    Window,
    check_bool,
    check_int,
    check_option,
    check_plan,
    check_tensors,
    window_sides,
)
from moda_ops.operators.attention import moda_attention
from moda_ops.operators.checks import DTYPES, Plan, sum_dtype
from moda_ops.operators.other_names import knows_other_names
from moda_ops.rules.autocast import compute_dtype
from moda_ops.stream import operators as operators  # registers torch.ops.moda.stream_*
from moda_ops.stream.arguments import check_kept, document_bounds
from moda_ops.stream.checkpointing import REENTRANT, in_reentrant_forward
from moda_ops.stream.checks import slots_left
from moda_ops.stream.guard import check_gradients, check_written, mark_without_gradient


class DepthStream(NamedTuple):
    """The keys and values that the layers of a model have written so far, in one buffer.

    A value like any other: ``write`` and ``attend`` return the stream for the next layer, and the
    one they were called on remains what it was. It is a tuple of two tensors and an int: it passes
    through ``torch.compile``, ``torch.utils.checkpoint`` and module boundaries.

    Beside a list of slots (:func:`moda_attention`) it needs fewer tensors and no addition of
    gradients outside the kernels: in backward each layer reads the running gradient of the slots,
    adds its own, and hands it on. Memory saved for backward is the buffer, once, and what each
    layer needs for itself. Compiled per block, any number of blocks shares a few graphs.

    Begin a new stream for every forward pass, and continue each value once: the slot after the last
    is written in place.

    Attributes:
        buffer: (slots, B, T, H, D + DV), keys and values side by side. Slots that are not written
            hold anything. Use ``keys`` or ``read`` to look at slots: a compiled function that
            slices the buffer itself may read a slot before it is written.
        token: (written, B, T, H, D + DV) in the dtype of gradients; one element of storage. It
            stands for the written slots in autograd.
        head_dim: D, where keys end and values begin.
        places: None as long as no slot has been dropped. Then for each row of the token its slot in
            the buffer, or -1 if it is dropped, and at the end the slot that is written next.

    Example:
        >>> B, T, HQ, H, D = 2, 16, 4, 2, 32
        >>> stream = DepthStream.allocate(slots=3, batch=B, tokens=T, kv_heads=H, head_dim=D)
        >>> x = torch.randn(B, T, HQ, D, requires_grad=True)
        >>> for layer in range(3):
        ...     k, v = x[:, :, :H].sin(), x[:, :, :H].cos()
        ...     stream = stream.write(k, v)
        ...     x, stream = stream.attend(x)  # to k and v, and to the slots of the layers before
        >>> x.shape, stream.written
        (torch.Size([2, 16, 4, 32]), 3)
    """

    buffer: Tensor
    token: Tensor
    head_dim: int
    places: tuple[int, ...] | None = None

    @classmethod
    def allocate(
        cls,
        slots: int,
        batch: int,
        tokens: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        like: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> "DepthStream":
        """An empty stream.

        Args:
            slots: how many slots can be written.
            batch: B.
            tokens: T.
            kv_heads: H.
            head_dim: D, of keys.
            value_dim: DV, of values; default D.
            like: the layers' input, or any tensor in the dtype and on the device of what they
                compute. Autocast is taken into account: where it is enabled, the dtype is its own.
            dtype: of keys and values; default: autocast's if it is enabled for the device, else
                that of ``like``, else PyTorch's default dtype.
            device: default: that of ``like``, else PyTorch's default device.
            grad_dtype: of the running gradient; default ``dtype``. ``torch.float32`` beside a
                16-bit ``dtype`` rounds once in all and not once per reading layer, and doubles the
                traffic of gradients.

        Raises:
            TypeError: a dtype that the operators do not take, or ``like`` is no tensor.
            ValueError: a size below 0 (``slots``, ``batch``, ``tokens``) or below 1.
        """
        value_dim = head_dim if value_dim is None else value_dim
        for name, size, least in (
            ("slots", slots, 0),
            ("batch", batch, 0),
            ("tokens", tokens, 0),
            ("kv_heads", kv_heads, 1),
            ("head_dim", head_dim, 1),
            ("value_dim", value_dim, 1),
        ):
            check_int(name, size, least)
        if like is not None:
            check_tensors(like=like)
            device = like.device if device is None else device
        device = torch.empty(0, device=device).device  # None is PyTorch's default device
        if dtype is None:
            given_dtype = torch.get_default_dtype() if like is None else like.dtype
            dtype = compute_dtype(given_dtype, device)
        grad_dtype = dtype if grad_dtype is None else grad_dtype
        for name, given in (("dtype", dtype), ("grad_dtype", grad_dtype)):
            if given not in DTYPES["cpu"]:
                allowed = ", ".join(map(str, DTYPES["cpu"]))
                raise TypeError(f"{name} must be one of {allowed}, got {given!r}")
        shape = (batch, tokens, kv_heads, head_dim + value_dim)
        # An empty of its own, because a compiler may merge equal calls but never two empties.
        unique = torch.empty(0, dtype=dtype, device=device)
        buffer = torch.ops.moda.stream_buffer(unique, (slots, *shape))
        return cls(buffer, torch.empty((0, *shape), dtype=grad_dtype, device=device), head_dim)

    def __repr__(self) -> str:
        if not isinstance(self.buffer, Tensor):  # what a tool puts in a tensor's place
            return f"DepthStream{tuple(self)}"
        _, B, T, H, _ = self.buffer.shape
        return (
            f"DepthStream(written={self.written}, slots={self.slots}, batch={B}, tokens={T}, "
            f"kv_heads={H}, head_dim={self.head_dim}, value_dim={self.value_dim}, "
            f"dtype={self.buffer.dtype}, device='{self.buffer.device}')"
        )

    @property
    def slots(self) -> int:
        """How many slots can be written in all."""
        return self.buffer.shape[0]

    @property
    def written(self) -> int:
        """How many slots are written, and not dropped."""
        places = None if self.places is None else self.places[:-1]
        return slots_left(self.token.shape[0], places)

    def keep(self, slots: Sequence[int]) -> "DepthStream":
        """The stream without all other slots, in training and in inference.

        Nothing is copied. Later layers read, and in backward add to, the slots that are left alone:
        that is what a layer costs, in time and in gradients that are alive, however many layers
        were before it. The buffer itself still holds what the dropped slots' readers need in
        backward. Equally spaced slots, such as the most recent ones, are read as one packed tensor,
        others as a list. Where the newest slot is dropped, ``attend`` wants another one written
        first, or k and v.

        Args:
            slots: which of the ``written`` slots stay, counted from the oldest one that is there,
                ascending. :mod:`moda_ops.policies` has ways to choose.

        Raises:
            TypeError, ValueError: no sequence of ints, or not ascending, or a slot that is not
                there; the text names it.

        Example:
            >>> stream = DepthStream.allocate(slots=4, batch=1, tokens=2, kv_heads=1, head_dim=4)
            >>> for layer in range(4):
            ...     k = torch.randn(1, 2, 1, 4)
            ...     out, stream = stream.write(k, k).attend(torch.randn(1, 2, 2, 4))
            ...     stream = stream.keep(range(stream.written)[-2:])
            >>> stream.written
            2
        """
        check_kept(slots, self.written)
        if len(slots) == self.written:
            return self
        written = self.token.shape[0]
        places = tuple(range(written + 1)) if self.places is None else self.places
        there = [row for row in range(written) if places[row] >= 0]
        stay = {there[slot] for slot in slots}
        kept = tuple(place if row in stay else -1 for row, place in enumerate(places[:-1]))
        return DepthStream(self.buffer, self.token, self.head_dim, (*kept, places[-1]))

    def _check_head_dim(self, name: str, x: Tensor) -> None:
        if x.shape[-1] != self.head_dim:
            raise ValueError(
                f"{name} must have the depth stream's head dim {self.head_dim}, got {x.shape[-1]}"
            )

    def write(self, k: Tensor, v: Tensor) -> "DepthStream":
        """The stream with one more slot.

        Args:
            k: (B, T, H, D) in the stream's dtype, any strides.
            v: (B, T, H, DV).

        Raises:
            TypeError, ValueError: k or v do not fit the stream, or it is full; the text names it.
            RuntimeError: this stream has been continued before.
        """
        check_tensors(k=k, v=v)
        self._check_head_dim("k", k)
        self._check_reentrant(writes=True)
        if self._cuts_gradients():
            # The slot has no gradient, but those before it have: the token must go on.
            with torch.inference_mode(False), torch.enable_grad():
                return self.write(k.detach(), v.detach())
        if self.places is None:
            token = torch.ops.moda.stream_write(k, v, self.buffer, self.token)
            return DepthStream(self.buffer, token, self.head_dim)
        end = self.places[-1]
        token = torch.ops.moda.stream_write(k, v, self.buffer, self.token, end)
        return DepthStream(self.buffer, token, self.head_dim, (*self.places, end + 1))

    def _traced(self) -> bool:
        """Whether the buffer is not plain memory: a compiler's, a transform's or a subclass's."""
        seen = torch.compiler.is_compiling() or private.transforms_active()
        return seen or type(self.buffer) is not Tensor

    def _check_reentrant(self, *, writes: bool = False) -> None:
        """Raise RuntimeError where a slot should have a gradient that a checkpoint has dropped."""
        if self._traced():
            return
        if torch.is_grad_enabled():
            check_gradients(self.buffer)
        elif writes and in_reentrant_forward():
            mark_without_gradient(self.buffer)

    def _cuts_gradients(self) -> bool:
        """Whether the slots need gradients and the mode here is one that would drop them."""
        if torch.is_grad_enabled() or not self.token.requires_grad:
            return False
        if not torch.compiler.is_compiling() and in_reentrant_forward():
            raise RuntimeError(REENTRANT)
        return True

    def read(self) -> Tensor:
        """A copy of the slots, (written, B, T, H, D + DV), keys and values side by side.

        Differentiable: a gradient of the copy is one of the slots, so that another process may go
        on with it.

        Example:
            >>> stream = DepthStream.allocate(slots=2, batch=1, tokens=3, kv_heads=1, head_dim=4)
            >>> k, v = torch.randn(2, 1, 3, 1, 4)
            >>> torch.equal(stream.write(k, v).read()[0], torch.cat((k, v), -1))
            True
        """
        self._check_reentrant()
        places = None if self.places is None else self.places[:-1]
        return torch.ops.moda.stream_read(self.buffer, self.token, places)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "DepthStream":
        """The stream on another device, to go on with there; itself if it is there already.

        The slots that are there are copied into a new buffer, with as much room for others, and
        their gradients come back. Do not move ``buffer`` and ``token`` by hand: the operators do
        not know which slots of such a copy are written, so they refuse it.

        Example:
            >>> stream = DepthStream.allocate(slots=2, batch=1, tokens=3, kv_heads=1, head_dim=4)
            >>> stream.to("cpu") is stream
            True
        """
        here = torch.empty(0, device=device).device == self.buffer.device
        return self if here else self._copied(device, non_blocking)

    def _copied(self, device: torch.device | str, non_blocking: bool = False) -> "DepthStream":
        _, B, T, H, _ = self.buffer.shape
        sizes = self.slots, B, T, H, self.head_dim, self.value_dim
        copied = DepthStream.allocate(
            *sizes, dtype=self.buffer.dtype, grad_dtype=self.token.dtype, device=device
        )
        for slot in self.read().to(device, non_blocking=non_blocking):
            copied = copied.write(slot[..., : self.head_dim], slot[..., self.head_dim :])
        return copied

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
    ) -> "tuple[Tensor, DepthStream]":
        """What :func:`moda_attention` computes, with depth read from the stream.

        Args:
            q: (B, T, HQ, D) in the stream's dtype.
            k: sequence keys (B, S, H, D). If k and v are None, the newest slot is the sequence, and
                depth are the slots before it.
            v: sequence values (B, S, H, DV).
            causal, scale, window, softcap, plan: as in :func:`moda_attention`.
            cu_seqlens: where packed documents begin, in queries and in keys, as in
                :func:`moda_attention_varlen`; for a stream of B = 1 whose tokens they share.

        Returns:
            ``out`` (B, T, HQ, DV) and the stream to pass on: through it the gradients of later
            readers come back in one piece.

        Raises:
            TypeError, ValueError: as :func:`moda_attention`; also if k is None and nothing is
                written.
        """
        options: Any = dict(causal=causal, scale=scale, window=window, softcap=softcap, plan=plan)
        out, _, stream = self._attend(q, k, v, cu_seqlens, **options)
        return out, stream

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
    ) -> "tuple[Tensor, Tensor, DepthStream]":
        """:meth:`attend`, and ``lse`` (B, HQ, T) before the stream."""
        options: Any = dict(causal=causal, scale=scale, window=window, softcap=softcap, plan=plan)
        out, lse, stream = self._attend(q, k, v, cu_seqlens, **options)
        return out, lse.to(sum_dtype(q)), stream

    def _attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cu_seqlens: tuple[Tensor, Tensor] | None,
        *,
        causal: bool,
        scale: float | None,
        window: Window | None,
        softcap: float | None,
        plan: Plan,
    ) -> "tuple[Tensor, Tensor, DepthStream]":
        """With the operator's own lse."""
        check_tensors(q=q, **{name: x for name, x in (("k", k), ("v", v)) if x is not None})
        self._check_head_dim("q", q)
        check_option("scale", scale)
        check_option("softcap", softcap)
        check_plan(plan)
        left, right = window_sides(window)
        self._check_reentrant()
        out, lse, token = torch.ops.moda.stream_attention(
            q,
            k,
            v,
            self.buffer,
            self.token,
            *(document_bounds(cu_seqlens) or (None, None)),
            None if self.places is None else self.places[:-1],
            causal=check_bool("causal", causal),
            scale=scale,
            window_left=left,
            window_right=right,
            softcap=softcap,
            plan=plan,
        )
        if self._cuts_gradients():
            return out, lse, self
        places = self.places
        if places is not None:
            places = *(place for place in places[:-1] if place >= 0), places[-1]
        return out, lse, DepthStream(self.buffer, token, self.head_dim, places)

    def keys(self) -> list[Tensor]:
        """The keys (B, T, H, D) of every slot that is there, without gradient.

        They are views of the buffer. In a compiled function they are views of one copy: a compiler
        does not see who writes to the buffer, and might read it too early.
        """
        places = None if self.places is None else self.places[:-1]
        if self._traced():
            copy = torch.ops.moda.stream_read(self.buffer, self.token.detach(), places)
            return [copy[i][..., : self.head_dim] for i in range(self.written)]
        there = [i for i in (places or range(self.written)) if i >= 0]
        check_written(self.buffer, there)
        return [self.buffer[i][..., : self.head_dim] for i in there]

    @property
    def value_dim(self) -> int:
        """DV, of values."""
        return self.buffer.shape[-1] - self.head_dim

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
    ) -> "tuple[Tensor, DepthStream]":
        """:func:`moda_attention` without depth: no slot is read.

        A method of every kind of stream, so that a layer need not know which it has; one that
        serves keeps k and v in its cache.

        Args:
            q: (B, T, HQ, D).
            k: sequence keys (B, S, H, D).
            v: sequence values (B, S, H, DV).
            causal, scale, window, softcap, plan: as in :func:`moda_attention`.

        Returns:
            ``out`` (B, T, HQ, DV) and the stream to pass on.
        """
        options: Any = dict(causal=causal, scale=scale, window=window, softcap=softcap, plan=plan)
        return moda_attention(q, k, v, [], [], **options), self

    @knows_other_names
    def attend_depth(
        self, q: Tensor, *, scale: float | None = None, softcap: float | None = None
    ) -> "tuple[Tensor, DepthStream]":
        """What :func:`moda_depth_attention` computes over all slots: no sequence is read.

        Args:
            q: (B, T, HQ, D) in the stream's dtype.
            scale, softcap: as in :func:`moda_depth_attention`.

        Returns:
            ``out`` (B, T, HQ, DV) and the stream to pass on.

        Raises:
            TypeError, ValueError: q does not fit the stream, or an option is outside its range.

        Example:
            >>> stream = DepthStream.allocate(slots=1, batch=1, tokens=2, kv_heads=1, head_dim=4)
            >>> v = torch.randn(1, 2, 1, 4)
            >>> out, stream = stream.write(torch.randn(1, 2, 1, 4), v).attend_depth(v)
            >>> torch.equal(out, v)  # of the one slot
            True
        """
        _, B, _, H, E = self.buffer.shape
        k = self.buffer.new_empty(B, 0, H, self.head_dim)
        v = self.buffer.new_empty(B, 0, H, E - self.head_dim)
        return self.attend(q, k, v, causal=False, scale=scale, softcap=softcap)


# For torch.export.save and load.
private.register_namedtuple(DepthStream, serialized_type_name="moda_ops.DepthStream")
torch.serialization.add_safe_globals([DepthStream])
