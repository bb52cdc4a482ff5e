"""What the operators accept: one pass over the arguments, errors that name the argument."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moda_ops.ops import Options

MAX_HEAD_DIM = 256
PLANS = ("auto", "fused", "split")
DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}


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
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got strides "
            f"{tuple(tensor.stride())}; call .contiguous() if a copy is acceptable"
        )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    options: "Options",
) -> None:
    """Raise ValueError or TypeError unless the arguments of ``moda::attention`` fit together."""
    _check_sequence(q, k, v)
    _check_depth(q, k_depth, v_depth, k.shape[2], v.shape[3])
    _check_options(options)


def check_depth_attention(
    q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], options: "Options"
) -> None:
    """Raise ValueError or TypeError unless the arguments of ``moda::depth_attention`` fit."""
    _check_query(q)
    H, DV = depth_heads(q, k_depth, v_depth)
    _check_depth(q, k_depth, v_depth, H, DV)
    _check_heads(q, "k_depth", H, "v_depth", DV)
    _check_options(options)


def depth_heads(q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor]) -> tuple[int, int]:
    """(H, DV) of depth; those of q where the list is empty and does not say."""
    H = k_depth[0].shape[-2] if k_depth and k_depth[0].dim() > 1 else q.shape[2]
    DV = v_depth[0].shape[-1] if v_depth and v_depth[0].dim() > 0 else q.shape[3]
    return H, DV


def _check_depth(q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], H: int, DV: int) -> None:
    B, T, _, D = q.shape
    if len(k_depth) != len(v_depth):
        raise ValueError(
            "k_depth and v_depth must have the same number of slots, "
            f"got {len(k_depth)} and {len(v_depth)}"
        )
    if len(k_depth) == 1 and k_depth[0].dim() == 5:
        L = k_depth[0].shape[2]
        _check_input("k_depth", k_depth[0], (B, T, L, H, D), "(B, T, L, H, D)", q)
        _check_input("v_depth", v_depth[0], (B, T, L, H, DV), "(B, T, L, H, DV)", q)
    else:
        dtype, device = q.dtype, q.device
        for name, slots, shape, dims in (
            ("k_depth", k_depth, (B, T, H, D), "(B, T, H, D)"),
            ("v_depth", v_depth, (B, T, H, DV), "(B, T, H, DV)"),
        ):
            for i, x in enumerate(slots):  # there may be hundreds: the cheapest test first
                fits = x.shape == shape and x.dtype is dtype and x.device == device
                if not (fits and x.stride(-1) == 1):
                    _check_input(f"{name}[{i}]", x, shape, dims, q)


def _check_query(q: Tensor) -> None:
    device = q.device.type
    if device not in DTYPES:
        raise ValueError(f"q must be on a cpu or cuda device, got {q.device}")
    if q.dtype not in DTYPES[device]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[device])
        raise TypeError(f"q must have one of the dtypes {allowed} on {device}, got {q.dtype}")
    if q.dim() != 4:
        raise ValueError(f"q must have shape (B, T, HQ, D), got {_shape(q)}")
    _check_last_stride("q", q)


def _check_sequence(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_query(q)
    for name, tensor, dims in (("k", k, "(B, S, H, D)"), ("v", v, "(B, S, H, DV)")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape {dims}, got {_shape(tensor)}")
    B, D = q.shape[0], q.shape[3]
    S, H, DV = k.shape[1], k.shape[2], v.shape[3]
    _check_input("k", k, (B, S, H, D), "(B, S, H, D)", q)
    _check_input("v", v, (B, S, H, DV), "(B, S, H, DV)", q)
    _check_heads(q, "k", H, "v", DV)


def _check_heads(q: Tensor, keys: str, H: int, values: str, DV: int) -> None:
    HQ, D = q.shape[2:]
    if H == 0 or HQ == 0 or HQ % H:
        raise ValueError(
            f"q's heads must be a positive multiple of {keys}'s, got HQ = {HQ} and H = {H}"
        )
    for name, dim in (("q", D), (values, DV)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}'s head dim must be within 1..{MAX_HEAD_DIM}, got {dim}")


def _check_options(options: "Options") -> None:
    if options.plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(map(repr, PLANS))}, got {options.plan!r}")
    if options.scale is not None and not math.isfinite(options.scale):
        raise ValueError(f"scale must be finite, got {options.scale}")
    if options.softcap is not None and not 0 < options.softcap < math.inf:
        raise ValueError(f"softcap must be a positive finite number, got {options.softcap}")
    for name in ("window_left", "window_right"):
        side = getattr(options, name)
        if side is not None and side < 0:
            raise ValueError(f"{name} must be >= 0 (None is unbounded), got {side}")


def check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")


def check_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    v: Tensor,
    lse_dtype: torch.dtype,
) -> None:
    """Raise unless the forward's results and their gradients fit q and v."""
    B, T, HQ, _ = q.shape
    for name, tensor, shape, dims, dtype in (
        ("dout", dout, (B, T, HQ, v.shape[-1]), "(B, T, HQ, DV)", q.dtype),
        ("out", out, (B, T, HQ, v.shape[-1]), "(B, T, HQ, DV)", q.dtype),
        ("dlse", dlse, (B, HQ, T), "(B, HQ, T)", lse_dtype),
        ("lse", lse, (B, HQ, T), "(B, HQ, T)", lse_dtype),
    ):
        if tensor is not None:
            check_like(name, tensor, shape, dims, dtype, q.device)
    for name, tensor in (("out", out), ("lse", lse)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, as the forward returned it, got strides "
                f"{tuple(tensor.stride())}"
            )


def check_stream(buffer: Tensor, token: Tensor) -> None:
    """Raise unless the two tensors of a depth stream fit together."""
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


def check_stream_write(k: Tensor, v: Tensor, buffer: Tensor, token: Tensor) -> None:
    """Raise unless k and v fit the next slot of the stream, and there is one."""
    check_stream(buffer, token)
    slots, B, T, H, E = buffer.shape
    if token.shape[0] == slots:
        raise ValueError(f"the depth stream is too short: all of its {slots} slots are written")
    for name, tensor, dims in (("k", k, "(B, T, H, D)"), ("v", v, "(B, T, H, DV)")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape {dims}, got {_shape(tensor)}")
        shape = (B, T, H, tensor.shape[-1])
        check_like(name, tensor, shape, dims, buffer.dtype, buffer.device, "the depth stream")
    if k.shape[-1] + v.shape[-1] != E:
        raise ValueError(
            f"k and v must have D + DV = {E} in all to fit the depth stream, "
            f"got D = {k.shape[-1]} and DV = {v.shape[-1]}"
        )


def check_stream_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    buffer: Tensor,
    token: Tensor,
    options: "Options",
) -> None:
    """Raise unless the arguments of ``moda::stream_attention`` fit together."""
    check_stream(buffer, token)
    _, B, T, H, E = buffer.shape
    if (k is None) != (v is None):
        given, missing = ("k", "v") if v is None else ("v", "k")
        raise ValueError(f"{given} is given but {missing} is None; give both or neither")
    if k is None and token.shape[0] == 0:
        raise ValueError(
            "the depth stream is empty: write this layer's keys and values first, or give k and v"
        )
    if q.dim() != 4:
        raise ValueError(f"q must have shape (B, T, HQ, D), got {_shape(q)}")
    if q.shape[-1] >= E:
        raise ValueError(
            f"q's head dim must be below the depth stream's D + DV = {E}, got {q.shape[-1]}"
        )
    if k is None or v is None:
        slot = buffer[0] if buffer.shape[0] else buffer.new_empty(buffer.shape[1:])
        k, v = slot[..., : q.shape[-1]], slot[..., q.shape[-1] :]
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
