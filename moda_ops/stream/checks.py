"""What the operators of a stream accept."""

from collections.abc import Sequence

from torch import Tensor

from moda_ops.operators.checks import (
    Sizes,
    check_both,
    check_cu_seqlens,
    check_like,
    check_options,
    shape_of,
)
from moda_ops.operators.options import Options

EMPTY_STREAM = (
    "the depth stream is empty: write this layer's keys and values first (write returns the stream "
    "to go on with: stream = stream.write(k, v)), or give k and v"
)


def check_stream(buffer: Tensor, token: Tensor, places: Sequence[int] | None = None) -> None:
    """Raise unless the parts of a depth stream fit together."""
    for name, tensor, dims in (
        ("buffer", buffer, "(slots, B, T, H, D + DV)"),
        ("token", token, "(written, B, T, H, D + DV)"),
    ):
        if tensor.dim() != 5:
            raise ValueError(f"{name} must have shape {dims}, got {shape_of(tensor)}")
    if token.shape[1:] != buffer.shape[1:] or token.shape[0] > buffer.shape[0]:
        raise ValueError(
            "token must have shape (written, B, T, H, D + DV), buffer's with written <= slots, got "
            f"{shape_of(token)} for {shape_of(buffer)}"
        )
    if token.device != buffer.device:
        raise ValueError(f"token must be on buffer's device {buffer.device}, got {token.device}")
    if not buffer.is_contiguous():
        raise ValueError(f"buffer must be contiguous, got strides {tuple(buffer.stride())}")
    if places is not None:
        if len(places) != token.shape[0]:
            raise ValueError(
                "places must have an entry for each of the token's "
                f"{token.shape[0]} rows, got {len(places)}"
            )
        for place in places:
            if place >= buffer.shape[0]:
                raise ValueError(
                    f"places must be below the buffer's {buffer.shape[0]} slots, got {place}"
                )


def slots_left(written: int, places: Sequence[int] | None) -> int:
    """How many of the written slots are there, where ``places`` is -1 for a dropped one."""
    return written if places is None else sum(1 for place in places if place >= 0)


def check_stream_write(
    k: Tensor, v: Tensor, buffer: Tensor, token: Tensor, slot: int | None
) -> int:
    """The slot that k and v go into, by default the token's next; raise unless they fit it."""
    check_stream(buffer, token)
    slots, B, T, H, E = buffer.shape
    slot = token.shape[0] if slot is None else slot
    if slot < 0:
        raise ValueError(f"slot must be at least 0, got {slot}")
    if slot >= slots:
        raise ValueError(
            f"the depth stream is too short: all of its {slots} slots are written; allocate it "
            "with as many slots= as the forward pass writes"
        )
    for name, tensor, dims in (("k", k, "(B, T, H, D)"), ("v", v, "(B, T, H, DV)")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape {dims}, got {shape_of(tensor)}")
        if tensor.shape[:3] != (B, T, H):
            raise ValueError(
                f"{name} must have shape {dims} with B = {B}, T = {T} and H = {H}, as the depth "
                f"stream was allocated (batch, tokens, kv_heads), got {shape_of(tensor)}"
            )
        shape = (B, T, H, tensor.shape[-1])
        check_like(name, tensor, shape, dims, buffer.dtype, buffer.device, "the depth stream")
    if k.shape[-1] + v.shape[-1] != E:
        raise ValueError(
            f"k and v must have D + DV = {E} in all to fit the depth stream, "
            f"got D = {k.shape[-1]} and DV = {v.shape[-1]}"
        )
    return slot


def check_stream_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    buffer: Tensor,
    token: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    places: Sequence[int] | None,
    options: Options,
) -> Sizes:
    """The sizes of a call of ``moda::stream_attention``; raise if its arguments do not fit."""
    check_stream(buffer, token, places)
    _, B, T, H, E = buffer.shape
    check_both("k", k, "v", v)
    check_both("cu_seqlens_q", cu_seqlens_q, "cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
        if B != 1:
            raise ValueError(f"packed documents need a depth stream of batch B = 1, got B = {B}")
    if k is None and places and places[-1] < 0:
        raise ValueError(
            "the newest slot of the depth stream has been dropped: write this layer's keys and "
            "values first, or give k and v"
        )
    if k is None and token.shape[0] == 0:
        raise ValueError(EMPTY_STREAM)
    if q.dim() != 4:
        raise ValueError(f"q must have shape (B, T, HQ, D), got {shape_of(q)}")
    if q.shape[-1] >= E:
        raise ValueError(
            f"q's head dim must be below the depth stream's D + DV = {E}, got {q.shape[-1]}"
        )
    if k is None or v is None:
        slot = buffer[0] if buffer.shape[0] else buffer.new_empty(buffer.shape[1:])
        k, v = slot[..., : q.shape[-1]], slot[..., q.shape[-1] :]
    if q.shape[:2] != (B, T):
        raise ValueError(
            f"q must have shape (B, T, HQ, D) with B = {B} and T = {T}, as the depth stream was "
            f"allocated (batch, tokens), got {shape_of(q)}"
        )
    check_like(
        "q",
        q,
        (B, T, q.shape[2], q.shape[3]),
        "(B, T, HQ, D)",
        buffer.dtype,
        buffer.device,
        "the depth stream",
    )
    sizes = Sizes(q, "B T HQ D")
    sizes.bind_keys(k, v, "B S H D", "B S H DV")
    if k.shape[2] != H or v.shape[-1] != E - q.shape[-1]:
        raise ValueError(
            f"k and v must have the depth stream's H = {H} heads and D + DV = {E}, got "
            f"{k.shape[2]} heads, D = {k.shape[-1]} and DV = {v.shape[-1]}"
        )
    check_options(options)
    return sizes
