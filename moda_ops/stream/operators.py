"""torch.ops.moda.stream_*: attention over a depth stream in one buffer, one running gradient.

A stream is two tensors:

* ``buffer`` (slots, B, T, H, D + DV): slot l holds layer l's keys and values side by side;
* ``token`` (n, B, T, H, D + DV): stands for the n slots written so far. It has one element of
  storage, its values mean nothing, and it exists for its gradient: the running gradient of those
  slots, which each reader in backward takes, adds its own to, and hands on.

Slots may be dropped. ``places`` then says which slot of the buffer each row of the token stands
for, and -1 for a dropped one; the token that a reader returns has the other rows alone. In backward
that reader begins a dropped slot's gradient, with zeros, to which those before it add.

``stream_write`` fills the next slot of the buffer *in place* although its schema says otherwise:
declared as a mutation, every layer's buffer would be a value of its own that backward has to save.
What makes this sound: a slot is written once, before any reader of it, which descends from the
write's token; no slot is read that the token in hand does not cover; and writing again the same
values, as activation checkpointing does, changes nothing. :mod:`moda_ops.stream.guard` holds every
real call to it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops.operators import definition as ops
from moda_ops.operators.checks import check_backward, check_like, lse_dtype
from moda_ops.operators.options import OPTIONS, Options
from moda_ops.rules.autocast import Autocast
from moda_ops.rules.autograd import no_derivative, register_autograd
from moda_ops.rules.flops import known_documents, visible_pairs
from moda_ops.rules.operator import Operator, define
from moda_ops.stream.checks import (
    check_stream,
    check_stream_attention,
    check_stream_write,
    slots_left,
)
from moda_ops.stream.guard import check_written, claim, remember


def _buffer(unique: Tensor, shape: Sequence[int]) -> Tensor:
    buffer = unique.new_empty(shape)
    remember(buffer)
    return buffer


def _buffer_fake(unique: Tensor, shape: Sequence[int]) -> Tensor:
    return unique.new_empty(shape)


def _new_token(token: Tensor, slots: int) -> Tensor:
    return token.new_empty_strided((slots, *token.shape[1:]), (0,) * token.dim())


def _write(k: Tensor, v: Tensor, buffer: Tensor, token: Tensor, slot: int | None = None) -> Tensor:
    slot = check_stream_write(k, v, buffer, token, slot)
    claim(buffer, slot, k, v)
    torch.cat([k, v], -1, out=buffer.data[slot])
    return _new_token(token, token.shape[0] + 1)


def _write_fake(
    k: Tensor, v: Tensor, buffer: Tensor, token: Tensor, slot: int | None = None
) -> Tensor:
    check_stream_write(k, v, buffer, token, slot)
    return _new_token(token, token.shape[0] + 1)


def _write_setup_context(
    ctx: Any, inputs: list[Any], options: dict[str, Any], output: Tensor
) -> None:
    k, v, *_ = inputs
    ctx.dims = k.shape[-1], v.shape[-1]
    ctx.set_materialize_grads(False)


def _write_backward(ctx: Any, dtoken: Tensor | None) -> tuple[Tensor | None, ...]:
    if dtoken is None:
        return None, None, None, None, None
    dk, dv = dtoken[-1].split(ctx.dims, -1)
    return dk, dv, None, dtoken[:-1], None


def _read(buffer: Tensor, token: Tensor, places: Sequence[int] | None = None) -> Tensor:
    check_stream(buffer, token, places)
    there = _Kept.of(token.shape[0], places).places
    check_written(buffer, there)
    if places is None or not there:
        return buffer[: len(there)].clone()
    return torch.stack([buffer[place] for place in there])


def _read_fake(buffer: Tensor, token: Tensor, places: Sequence[int] | None = None) -> Tensor:
    check_stream(buffer, token, places)
    return buffer.new_empty(slots_left(token.shape[0], places), *token.shape[1:])


def _read_setup_context(
    ctx: Any, inputs: list[Any], options: dict[str, Any], output: Tensor
) -> None:
    _, token, ctx.places = inputs
    ctx.slots, ctx.grad_dtype = token.shape[0], token.dtype


def _read_backward(ctx: Any, dslots: Tensor) -> tuple[None, Tensor, None]:
    return None, _with_dropped(dslots.to(ctx.grad_dtype), ctx.slots, ctx.places), None


def _with_dropped(grads: Tensor, slots: int, places: Sequence[int] | None) -> Tensor:
    """Gradients of the slots that are there, with zeros for those that have been dropped."""
    kept = _Kept.of(slots, places)
    if len(kept.rows) == slots:
        return grads
    every = grads.new_zeros(slots, *grads.shape[1:])
    for row, grad in zip(kept.rows, grads, strict=True):
        every[row] = grad
    return every


class _Kept(NamedTuple):
    """The slots that are still there: rows of the token, and where they are in the buffer."""

    rows: Sequence[int]
    places: Sequence[int]

    @classmethod
    def of(cls, slots: int, places: Sequence[int] | None) -> "_Kept":
        if places is None:
            return cls(range(slots), range(slots))
        rows = [row for row, place in enumerate(places) if place >= 0]
        return cls(rows, [places[row] for row in rows])

    def first(self, L: int) -> "_Kept":
        return _Kept(self.rows[:L], self.places[:L])

    @property
    def packed(self) -> bool:
        """Whether all of these, in every tensor, are one tensor with a stride from slot to slot."""
        return _evenly_spaced(self.rows) and _evenly_spaced(self.places)


def _evenly_spaced(slots: Sequence[int]) -> bool:
    return isinstance(slots, range) or len({b - a for a, b in pairwise(slots)}) <= 1


def _keys_and_values(
    x: Tensor, slots: Sequence[int], D: int, packed: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of some slots of x: each one packed tensor (B, T, L, H, ..), or a list."""
    if len(slots) == 0:
        return [], []
    if not packed:
        return [x[slot][..., :D] for slot in slots], [x[slot][..., D:] for slot in slots]
    step = slots[1] - slots[0] if len(slots) > 1 else 1
    together = x[slots[0] : slots[-1] + 1 : step].permute(1, 2, 0, 3, 4)
    return [together[..., :D]], [together[..., D:]]


def _pair(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if first is None or second is None else (first, second)


def _sequence(
    k: Tensor | None, v: Tensor | None, x: Tensor, slots: Sequence[int], D: int
) -> tuple[Tensor, Tensor, int]:
    """The sequence's keys and values, and how many slots are depth: all, or all but the newest."""
    if k is not None and v is not None:
        return k, v, len(slots)
    newest = x[slots[-1]]
    return newest[..., :D], newest[..., D:], len(slots) - 1


def _attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    buffer: Tensor,
    token: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    places: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    opts, cu_seqlens = Options(**options), (cu_seqlens_q, cu_seqlens_k)
    check_stream_attention(q, k, v, buffer, token, *cu_seqlens, places, opts)
    kept, D = _Kept.of(token.shape[0], places), q.shape[-1]
    check_written(buffer, kept.places)
    k, v, L = _sequence(k, v, buffer, kept.places, D)
    depth = kept.first(L)
    out, lse = ops.implementation(q).attention(
        q,
        k,
        v,
        *_keys_and_values(buffer, depth.places, D, depth.packed),
        *opts.resolved(D),
        cu_seqlens=_pair(*cu_seqlens),
    )
    return out, lse, _new_token(token, len(kept.rows))


def _attention_fake(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    buffer: Tensor,
    token: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    places: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    opts = Options(**options)
    check_stream_attention(q, k, v, buffer, token, cu_seqlens_q, cu_seqlens_k, places, opts)
    B, T, HQ, D = q.shape
    out = q.new_empty(B, T, HQ, buffer.shape[-1] - D)
    lse = q.new_empty(B, HQ, T, dtype=lse_dtype(q))
    return out, lse, _new_token(token, slots_left(token.shape[0], places))


def _attention_setup_context(
    ctx: Any,
    inputs: list[Any],
    options: dict[str, Any],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    q, k, v, buffer, token, cu_seqlens_q, cu_seqlens_k, ctx.places = inputs
    out, lse, _ = output
    ctx.save_for_backward(q, k, v, buffer, out, lse, cu_seqlens_q, cu_seqlens_k)
    ctx.slots, ctx.grad_dtype, ctx.options = token.shape[0], token.dtype, options
    ctx.set_materialize_grads(False)


def _attention_backward_formula(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dtoken: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        if dtoken is not None:
            dtoken = _with_dropped(dtoken, ctx.slots, ctx.places)
        return None, None, None, None, dtoken, None, None, None
    q, k, v, buffer, out, lse, *cu_seqlens = ctx.saved_tensors
    dq, dk_dv, dtoken = torch.ops.moda.stream_attention_backward(
        dout,
        dlse,
        dtoken,
        q,
        k,
        v,
        buffer,
        out,
        lse,
        ctx.slots,
        ctx.grad_dtype,
        *cu_seqlens,
        ctx.places,
        **ctx.options,
    )
    dk, dv = dk_dv or (None, None)
    return dq, dk, dv, None, dtoken, None, None, None


def _attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dtoken: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    buffer: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: int,
    grad_dtype: torch.dtype,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    places: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    opts = Options(**options)
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    _check_attention_backward(
        dout, dlse, dtoken, q, k, v, buffer, out, lse, slots, grad_dtype, *cu_seqlens, places, opts
    )
    kept, D = _Kept.of(slots, places), q.shape[-1]
    check_written(buffer, kept.places, forward=False)
    if dtoken is not None and dtoken.stride(-1) != 1:
        dtoken = dtoken.contiguous()
    dout = torch.zeros_like(out) if dout is None else dout
    grads = buffer.new_empty((slots, *buffer.shape[1:]), dtype=grad_dtype)
    dk_dv = [x.new_empty(x.shape) for x in (k, v) if x is not None]  # of keys outside the stream
    for row in set(range(slots)).difference(kept.rows):
        grads[row].zero_()
    into = dk_dv or _sequence(None, None, grads, kept.rows, D)[:2]
    running: Sequence[Tensor | None] = (None, None)
    if dtoken is not None and not dk_dv:
        running = _sequence(None, None, dtoken, range(len(dtoken)), D)[:2]
    k, v, L = _sequence(k, v, buffer, kept.places, D)
    depth = kept.first(L)
    packed = depth.packed
    handed = None
    if dtoken is not None:
        handed = (*running, *_keys_and_values(dtoken, range(L), D, packed))
    dq, *_ = ops.implementation(q).attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        *_keys_and_values(buffer, depth.places, D, packed),
        out,
        lse,
        *opts.resolved(D),
        cu_seqlens=_pair(*cu_seqlens),
        grads=(*into, *_keys_and_values(grads, depth.rows, D, packed)),
        running=handed,
    )
    return dq, dk_dv, grads


def _attention_backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    dtoken: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    buffer: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: int,
    grad_dtype: torch.dtype,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    places: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    opts = Options(**options)
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    _check_attention_backward(
        dout, dlse, dtoken, q, k, v, buffer, out, lse, slots, grad_dtype, *cu_seqlens, places, opts
    )
    dk_dv = [x.new_empty(x.shape) for x in (k, v) if x is not None]
    grads = buffer.new_empty((slots, *buffer.shape[1:]), dtype=grad_dtype)
    return q.new_empty(q.shape), dk_dv, grads


def _check_attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    dtoken: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    buffer: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: int,
    grad_dtype: torch.dtype,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    places: Sequence[int] | None,
    options: Options,
) -> None:
    token = _new_token(buffer[:0].to(grad_dtype), slots)
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    sizes = check_stream_attention(q, k, v, buffer, token, *cu_seqlens, places, options)
    check_backward(sizes, ("B T HQ DV", "B HQ T"), dout, dlse, out, lse)
    if dtoken is not None:
        shape = slots_left(token.shape[0], places), *token.shape[1:]
        check_like("dtoken", dtoken, shape, "(slots, B, T, H, D + DV)", grad_dtype, q.device)


def _pairs(
    q: Tensor,
    buffer: Tensor,
    k: Tensor | None = None,
    token: Tensor | None = None,
    slots: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    places: Sequence[int] | None = None,
    causal: bool = True,
    window_left: int | None = None,
    window_right: int | None = None,
    **_: Any,
) -> int:
    (B, T), right = q.shape[:2], 0 if causal else window_right
    written: Any = slots if token is None else token.shape[0]  # backward has the number itself
    left = slots_left(written, places)
    depth, S = (left - 1, T) if k is None else (left, k.shape[1])
    documents: Iterator[tuple[int, int]] = iter([(T, S)] * B)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        documents = known_documents((cu_seqlens_q, cu_seqlens_k), T, S)
    return sum(visible_pairs(t, s, window_left, right) for t, s in documents) + B * T * depth


_TENSORS = "Tensor? k, Tensor? v, Tensor buffer"
_PACKED = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt[]? places=None"
_IN_PLACE = "a DepthStream is written in place; map over DepthSlots, or over moda_attention"
_AUTOCAST = Autocast(memory=("buffer", "token"))
for _operator in (
    Operator(
        "stream_buffer(Tensor unique, SymInt[] shape) -> Tensor buffer",
        _buffer,
        _buffer_fake,
        vmap=_IN_PLACE,
    ),
    Operator(
        "stream_write(Tensor k, Tensor v, Tensor buffer, Tensor token, SymInt? slot=None) "
        "-> Tensor token",
        _write,
        _write_fake,
        partial(register_autograd, backward=_write_backward, setup_context=_write_setup_context),
        _AUTOCAST,
        _IN_PLACE,
    ),
    Operator(
        "stream_read(Tensor buffer, Tensor token, SymInt[]? places=None) -> Tensor slots",
        _read,
        _read_fake,
        partial(register_autograd, backward=_read_backward, setup_context=_read_setup_context),
        vmap=_IN_PLACE,
    ),
    Operator(
        f"stream_attention(Tensor q, {_TENSORS}, Tensor token, {_PACKED}, {OPTIONS}) "
        "-> (Tensor out, Tensor lse, Tensor token)",
        _attention,
        _attention_fake,
        partial(
            register_autograd,
            backward=_attention_backward_formula,
            setup_context=_attention_setup_context,
        ),
        _AUTOCAST,
        _IN_PLACE,
        _pairs,
    ),
    Operator(
        "stream_attention_backward(Tensor? dout, Tensor? dlse, Tensor? dtoken, Tensor q, "
        f"{_TENSORS}, Tensor out, Tensor lse, SymInt slots, ScalarType grad_dtype, {_PACKED}, "
        f"{OPTIONS}) -> (Tensor dq, Tensor[] dk_dv, Tensor dtoken)",
        _attention_backward,
        _attention_backward_fake,
        partial(register_autograd, backward=no_derivative("stream_attention")),
        vmap=_IN_PLACE,
        pairs=_pairs,
    ),
):
    define(_operator)
