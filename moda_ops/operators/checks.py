"""What the operators accept: one pass over the arguments, errors that name the argument."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moda_ops.operators.definition import Options

MAX_HEAD_DIM = 256
MAX_CAPACITY = 2**30 - 2**20  # of a cache, in tokens; leaves room for what is added to positions
SCALES = -1e30, 1e30
SOFTCAPS = 1e-7, 1e30
"""What float32 carries: scale / softcap and softcap * log2(e) are finite, and a score divided by
softcap and multiplied by it again is the same to 1e-8, although float32 ends at 1e-38."""
Plan = Literal["auto", "fused", "split"]
PLANS = get_args(Plan)
DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
    "meta": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


def sum_dtype(q: Tensor) -> torch.dtype:
    """The dtype of the lse and masses that public functions return: at least float32."""
    return torch.promote_types(q.dtype, torch.float32)


def lse_dtype(q: Tensor) -> torch.dtype:
    """The dtype of the lse that operators hand to their backward: float64 for float32 inputs.

    At 1,000 the spacing of float32 numbers is 6e-5, and a probability exp(score - lse) would be
    wrong by as much.
    """
    return torch.float64 if q.dtype is torch.float32 else sum_dtype(q)


def mass_lse_dtype(q: Tensor, lse: Tensor) -> torch.dtype:
    """The dtype that lse must have beside q: an operator's lse serves as well as a function's."""
    return lse.dtype if lse.dtype is lse_dtype(q) else sum_dtype(q)


class Axes(NamedTuple):
    """The axes before the heads', as errors call them: of queries, of keys, and how many."""

    queries: str
    keys: str
    rank: int


BATCHED = Axes("B, T", "B, S", 2)
PACKED = Axes("total_q", "total_k", 1)
DECODING = Axes("B, N", "B, S_max", 2)


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in tensor.shape) + ")"


def check_like(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dims: str,
    dtype: torch.dtype,
    device: torch.device,
    whose: str = "q",
) -> None:
    if tensor.shape != shape:
        expected = ", ".join(str(n) for n in shape)
        raise ValueError(f"{name} must have shape {dims} = ({expected}), got {_shape(tensor)}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must have dtype {dtype} to fit {whose}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {whose}'s device {device}, got {tensor.device}")


def _check_input(name: str, tensor: Tensor, shape: tuple[int, ...], dims: str, q: Tensor) -> None:
    """Shape, q's dtype and device, and unit stride in the last axis."""
    check_like(name, tensor, shape, dims, q.dtype, q.device)
    _check_last_stride(name, tensor)


def _check_last_stride(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got strides "
            f"{tuple(tensor.stride())}; call .contiguous() if a copy is acceptable"
        )


def _check_indices(name: str, tensor: Tensor, shape: tuple[int, ...], dims: str, q: Tensor) -> None:
    """Shape, int32, q's device, and unit stride in the last axis."""
    if tensor.dtype is not torch.int32:
        raise TypeError(f"{name} must have dtype torch.int32, got {tensor.dtype}; call .int()")
    check_like(name, tensor, shape, dims, torch.int32, q.device)
    _check_last_stride(name, tensor)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    options: "Options",
    axes: Axes = BATCHED,
) -> None:
    """Raise ValueError or TypeError unless the arguments of ``moda::attention`` fit together."""
    _check_sequence(q, k, v, axes)
    _check_depth(q, k_depth, v_depth, k.shape[-2], v.shape[-1], axes)
    _check_options(options)


def check_depth_attention(
    q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], options: "Options"
) -> None:
    """Raise ValueError or TypeError unless the arguments of ``moda::depth_attention`` fit."""
    _check_query(q, BATCHED)
    H, DV = depth_heads(q, k_depth, v_depth)
    _check_depth(q, k_depth, v_depth, H, DV, BATCHED)
    _check_heads(q.shape[-2], H, q.shape[-1], DV, "k_depth", "v_depth")
    _check_options(options)


def depth_heads(q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor]) -> tuple[int, int]:
    """(H, DV) of depth; those of q where the list is empty and does not say."""
    H = k_depth[0].shape[-2] if k_depth and k_depth[0].dim() > 1 else q.shape[2]
    DV = v_depth[0].shape[-1] if v_depth and v_depth[0].dim() > 0 else q.shape[3]
    return H, DV


def check_depth_mass(q: Tensor, k_depth: list[Tensor], lse: Tensor, options: "Options") -> None:
    """Raise ValueError or TypeError unless the arguments of ``moda::depth_mass`` fit together."""
    _check_query(q, BATCHED)
    (B, T, HQ, D), (H, _) = q.shape, depth_heads(q, k_depth, [])
    L = k_depth[0].shape[-3] if is_packed(k_depth) else None
    _check_slots("k_depth", "D", q, k_depth, H, D, BATCHED, L)
    _check_heads(HQ, H, D, D, "k_depth", "q")
    check_like("lse", lse, (B, HQ, T), "(B, HQ, T)", mass_lse_dtype(q, lse), q.device)
    _check_options(options)


def is_packed(depth: Sequence[Tensor], axes: Axes = BATCHED) -> bool:
    """Whether a list is the operators' form of one packed tensor, and not a list of slots."""
    return len(depth) == 1 and depth[0].dim() == axes.rank + 3


def _check_depth(
    q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], H: int, DV: int, axes: Axes
) -> None:
    if not k_depth and not v_depth:
        return
    packed = is_packed(k_depth, axes)
    if packed != is_packed(v_depth, axes):
        k, v = (
            f"one packed tensor of shape {_shape(depth[0])}"
            if is_packed(depth, axes)
            else f"a list of length {len(depth)}"
            for depth in (k_depth, v_depth)
        )
        raise ValueError(
            "k_depth and v_depth must both be lists of slots or both packed tensors, "
            f"got {k} and {v}"
        )
    if len(k_depth) != len(v_depth):
        raise ValueError(
            "k_depth and v_depth must have the same number of slots, "
            f"got {len(k_depth)} and {len(v_depth)}"
        )
    L = k_depth[0].shape[-3] if packed else None
    _check_slots("k_depth", "D", q, k_depth, H, q.shape[-1], axes, L)
    _check_slots("v_depth", "DV", q, v_depth, H, DV, axes, L)


def _check_slots(
    name: str,
    width: str,
    q: Tensor,
    depth: list[Tensor],
    H: int,
    D: int,
    axes: Axes,
    L: int | None,
) -> None:
    """One of the two depths; ``L`` is the number of packed slots, None of a list."""
    tokens = q.shape[: axes.rank]
    if L is not None:
        dims = f"({axes.queries}, L, H, {width})"
        return _check_input(name, depth[0], (*tokens, L, H, D), dims, q)
    shape, dims = (*tokens, H, D), f"({axes.queries}, H, {width})"
    dtype, device = q.dtype, q.device
    for i, x in enumerate(depth):  # there may be hundreds: the cheapest test first
        fits = x.shape == shape and x.dtype is dtype and x.device == device
        if not (fits and x.stride(-1) == 1):
            _check_input(f"{name}[{i}]", x, shape, dims, q)


def _check_query(q: Tensor, axes: Axes) -> None:
    """Device, dtype and rank."""
    device = q.device.type
    if device not in DTYPES:
        raise ValueError(f"q must be on a cpu, cuda or meta device, got {q.device}")
    if q.dtype not in DTYPES[device]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[device])
        raise TypeError(f"q must have one of the dtypes {allowed} on {device}, got {q.dtype}")
    _check_rank("q", q, f"({axes.queries}, HQ, D)")
    _check_last_stride("q", q)


def _check_rank(name: str, tensor: Tensor, dims: str) -> None:
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} must have shape {dims}, got {_shape(tensor)}")


def _check_sequence(q: Tensor, k: Tensor, v: Tensor, axes: Axes = BATCHED) -> None:
    _check_query(q, axes)
    k_dims, v_dims = f"({axes.keys}, H, D)", f"({axes.keys}, H, DV)"
    _check_rank("k", k, k_dims)
    _check_rank("v", v, v_dims)
    HQ, D = q.shape[-2:]
    H, DV = k.shape[-2], v.shape[-1]
    keys = *q.shape[: axes.rank - 1], k.shape[axes.rank - 1]
    _check_input("k", k, (*keys, H, D), k_dims, q)
    _check_input("v", v, (*keys, H, DV), v_dims, q)
    _check_heads(HQ, H, D, DV, "k", "v")


def _check_heads(HQ: int, H: int, D: int, DV: int, k: str, v: str) -> None:
    """``k`` and ``v`` are the arguments' names."""
    if H == 0 or HQ == 0 or HQ % H:
        raise ValueError(
            f"q's heads must be a positive multiple of {k}'s, got HQ = {HQ} and H = {H}; "
            "heads are the second to last dimension"
        )
    for name, dim in (("q", D), (v, DV)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}'s head dim must be within 1..{MAX_HEAD_DIM}, got {dim}")


def check_both(name: str, x: object, other: str, y: object) -> None:
    if (x is None) != (y is None):
        given, missing = (name, other) if y is None else (other, name)
        raise ValueError(f"{given} is given but {missing} is None; give both or neither")


def check_cu_seqlens(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor) -> None:
    """Raise unless these can bound documents; their values stay on their device, unread."""
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dim() != 1 or cu.shape[0] == 0:
            raise ValueError(f"{name} must have shape (documents + 1,), got {_shape(cu)}")
        _check_indices(name, cu, cu.shape, "(documents + 1,)", q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same length, documents + 1, got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )


def _check_options(options: "Options") -> None:
    if options.plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(map(repr, PLANS))}, got {options.plan!r}")
    if options.scale is not None:
        _check_number("scale", options.scale, *SCALES)
    if options.softcap is not None:
        _check_number("softcap", options.softcap, *SOFTCAPS)
    for name in ("window_left", "window_right"):
        side = getattr(options, name)
        if side is not None and side < 0:
            raise ValueError(f"{name} must be >= 0 (None is unbounded), got {side}")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    """A symbol has no value yet: the operator checks the one that it is called with."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be within {least:g}..{most:g}, got {value}")


def check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def check_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    v: Tensor,
    axes: Axes = BATCHED,
) -> None:
    """Raise unless the forward's results and their gradients fit q and v."""
    *batch, T, HQ, _ = q.shape
    rows, out_dims = (*batch, T, HQ, v.shape[-1]), f"({axes.queries}, HQ, DV)"
    lse_dims = "(B, HQ, T)" if axes is BATCHED else f"(HQ, {axes.queries})"
    for name, tensor, shape, dims, dtype in (
        ("dout", dout, rows, out_dims, q.dtype),
        ("out", out, rows, out_dims, q.dtype),
        ("dlse", dlse, (*batch, HQ, T), lse_dims, lse_dtype(q)),
        ("lse", lse, (*batch, HQ, T), lse_dims, lse_dtype(q)),
    ):
        if tensor is not None:
            check_like(name, tensor, shape, dims, dtype, q.device)
    for name, tensor in (("out", out), ("lse", lse)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, as the forward returned it, got strides "
                f"{tuple(tensor.stride())}"
            )


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
            raise ValueError(f"{name} must have shape {dims}, got {_shape(tensor)}")
    if token.shape[1:] != buffer.shape[1:] or token.shape[0] > buffer.shape[0]:
        raise ValueError(
            "token must have shape (written, B, T, H, D + DV), buffer's with written <= slots, got "
            f"{_shape(token)} for {_shape(buffer)}"
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
            raise ValueError(f"{name} must have shape {dims}, got {_shape(tensor)}")
        if tensor.shape[:3] != (B, T, H):
            raise ValueError(
                f"{name} must have shape {dims} with B = {B}, T = {T} and H = {H}, as the depth "
                f"stream was allocated (batch, tokens, kv_heads), got {_shape(tensor)}"
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
    options: "Options",
) -> None:
    """Raise unless the arguments of ``moda::stream_attention`` fit together."""
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
        raise ValueError(f"q must have shape (B, T, HQ, D), got {_shape(q)}")
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
            f"allocated (batch, tokens), got {_shape(q)}"
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
    _check_sequence(q, k, v)
    if k.shape[2] != H or v.shape[-1] != E - q.shape[-1]:
        raise ValueError(
            f"k and v must have the depth stream's H = {H} heads and D + DV = {E}, got "
            f"{k.shape[2]} heads, D = {k.shape[-1]} and DV = {v.shape[-1]}"
        )
    _check_options(options)


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one rank share memory.

    They do if the distance of their first elements is a sum of steps along the axes, fewer in each
    than the axis is long. Strides are taken from the largest on, so that at most two numbers of
    steps come near the distance. From the first axis on in which strides differ, all is one piece.
    """
    if not x.numel() or not y.numel() or x.untyped_storage()._cdata != y.untyped_storage()._cdata:
        return False
    axes = sorted(zip(x.stride(), y.stride(), x.shape, y.shape, strict=True), reverse=True)

    def met(distance: int, axis: int) -> bool:
        if axis == len(axes):
            return distance == 0
        stride, other, n, m = axes[axis]
        if stride != other:
            first, second = (sum((a[i + 2] - 1) * a[i] for a in axes[axis:]) for i in (0, 1))
            return -second <= distance <= first
        steps = {distance // stride, -(-distance // stride)} if stride else {0}
        return any(-m < i < n and met(distance - i * stride, axis + 1) for i in steps)

    return met(int(y.storage_offset()) - int(x.storage_offset()), 0)


def check_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_new: Tensor | None,
    v_new: Tensor | None,
    options: "Options",
) -> None:
    """Raise unless the arguments of ``moda::decode`` or ``moda::decode_`` fit together."""
    first, second = ("B", "S_max") if block_table is None else ("pages", "page_size")
    _check_query(q, DECODING)
    _check_rank("k_cache", k_cache, f"({first}, {second}, H, D)")
    _check_rank("v_cache", v_cache, f"({first}, {second}, H, DV)")
    (B, N, HQ, D), (_, size, H, _), DV = q.shape, k_cache.shape, v_cache.shape[3]
    rows = B if block_table is None else k_cache.shape[0]
    _check_input("k_cache", k_cache, (rows, size, H, D), f"({first}, {second}, H, D)", q)
    _check_input("v_cache", v_cache, (rows, size, H, DV), f"({first}, {second}, H, DV)", q)
    _check_heads(HQ, H, D, DV, "k_cache", "v_cache")
    _check_depth(q, k_depth, v_depth, H, DV, DECODING)
    _check_indices("cache_seqlens", cache_seqlens, (B,), "(B,)", q)
    capacity, names = size, "S_max"
    if block_table is not None:
        _check_rank("block_table", block_table, "(B, max_pages)")
        columns = block_table.shape[1]
        _check_indices("block_table", block_table, (B, columns), "(B, max_pages)", q)
        if size == 0:
            raise ValueError("k_cache must have a page_size of at least 1, got 0")
        capacity, names = size * columns, "page_size * max_pages"
    if capacity > MAX_CAPACITY:
        raise ValueError(
            f"{names} must be at most {MAX_CAPACITY}: positions are int32, got {capacity}"
        )
    if k_new is not None and v_new is not None:
        _check_input("k_new", k_new, (B, N, H, D), "(B, N, H, D)", q)
        _check_input("v_new", v_new, (B, N, H, DV), "(B, N, H, DV)", q)
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if any(
                stride == 0 and n > 1 for stride, n in zip(cache.stride(), cache.shape, strict=True)
            ):
                raise ValueError(
                    f"{name} is written to and must not repeat its memory, got strides "
                    f"{tuple(cache.stride())} for shape {_shape(cache)}"
                )
    _check_options(options)
