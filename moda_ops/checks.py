"""What the operators accept: one pass over the arguments, errors that name the argument."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moda_ops.ops import Options

MAX_HEAD_DIM = 256
DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(str(n) for n in tensor.shape) + ")"


def _check_like(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dims: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if tensor.shape != shape:
        expected = ", ".join(str(n) for n in shape)
        raise ValueError(f"{name} must have shape {dims} = ({expected}), got {_shape(tensor)}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must have dtype {dtype} to fit q, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {tensor.device}")


def _check_input(name: str, tensor: Tensor, shape: tuple[int, ...], dims: str, q: Tensor) -> None:
    """Shape, q's dtype and device, and unit stride in the last axis."""
    _check_like(name, tensor, shape, dims, q.dtype, q.device)
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
    device = q.device.type
    if device not in DTYPES:
        raise ValueError(f"q must be on a cpu or cuda device, got {q.device}")
    if q.dtype not in DTYPES[device]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[device])
        raise TypeError(f"q must have one of the dtypes {allowed} on {device}, got {q.dtype}")
    for name, tensor, dims in (
        ("q", q, "(B, T, HQ, D)"),
        ("k", k, "(B, S, H, D)"),
        ("v", v, "(B, S, H, DV)"),
    ):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape {dims}, got {_shape(tensor)}")
    B, T, HQ, D = q.shape
    S, H, DV = k.shape[1], k.shape[2], v.shape[3]
    _check_input("q", q, (B, T, HQ, D), "(B, T, HQ, D)", q)
    _check_input("k", k, (B, S, H, D), "(B, S, H, D)", q)
    _check_input("v", v, (B, S, H, DV), "(B, S, H, DV)", q)
    if H == 0 or HQ == 0 or HQ % H:
        raise ValueError(f"q's heads must be a positive multiple of k's, got HQ = {HQ} and H = {H}")
    for name, dim in (("q", D), ("v", DV)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}'s head dim must be within 1..{MAX_HEAD_DIM}, got {dim}")

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
        for i, (k_slot, v_slot) in enumerate(zip(k_depth, v_depth, strict=True)):
            _check_input(f"k_depth[{i}]", k_slot, (B, T, H, D), "(B, T, H, D)", q)
            _check_input(f"v_depth[{i}]", v_slot, (B, T, H, DV), "(B, T, H, DV)", q)

    if options.scale is not None and not math.isfinite(options.scale):
        raise ValueError(f"scale must be finite, got {options.scale}")
    if options.softcap is not None and not 0 < options.softcap < math.inf:
        raise ValueError(f"softcap must be a positive finite number, got {options.softcap}")
    for name in ("window_left", "window_right"):
        side = getattr(options, name)
        if side is not None and side < 0:
            raise ValueError(f"{name} must be >= 0 (None is unbounded), got {side}")


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
            _check_like(name, tensor, shape, dims, dtype, q.device)
    for name, tensor in (("out", out), ("lse", lse)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, as the forward returned it, got strides "
                f"{tuple(tensor.stride())}"
            )
