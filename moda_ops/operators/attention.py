"""The public function: friendly arguments in, one call of ``torch.ops.moda.attention`` out."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from moda_ops.operators.checks import BATCHED, Axes, Plan, check_both, sum_dtype
from moda_ops.operators.other_names import knows_other_names

Depth = Sequence[Tensor] | Tensor
Window = int | tuple[int | None, int | None]


@overload
def moda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None = ...,
    v_depth: Depth | None = ...,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    plan: Plan = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def moda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None = ...,
    v_depth: Depth | None = ...,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: Window | None = ...,
    softcap: float | None = ...,
    plan: Plan = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@knows_other_names
def moda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Depth | None = None,
    v_depth: Depth | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    plan: Plan = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend, under one softmax, to a sequence's keys and to the depth keys of the query's token.

    For batch b, token t, query head h and its key/value head j = h // G (all of one batch b)::

        a_n = scale * q[t,h] . k[n,j]               for every visible sequence key n
        d_l = scale * q[t,h] . k_depth[l][t,j]      for every depth slot l
        lse = log( sum_n exp a_n + sum_l exp d_l )
        out = sum_n exp(a_n - lse) v[n,j] + sum_l exp(d_l - lse) v_depth[l][t,j]

    (arXiv 2603.15619, section 2, mechanism (d); the kernel is its algorithm 1.) Differentiable in
    every tensor argument, through ``out`` and through ``lse``. Nothing is copied: tensors are read
    where they lie, with any strides whose last is 1.

    Args:
        q: queries, (B, T, HQ, D); float16, bfloat16 or float32, on a CPU also float64.
        k: sequence keys, (B, S, H, D), q's dtype. HQ = G * H for an integer G >= 1.
        v: sequence values, (B, S, H, DV), q's dtype. 1 <= D, DV <= 256.
        k_depth: depth keys, q's dtype: a list of L slots (B, T, H, D), or one packed tensor
            (B, T, L, H, D). ``None`` and the empty list mean L = 0, plain attention.
        v_depth: depth values in the same form: slots (B, T, H, DV) or packed (B, T, L, H, DV).
        causal: query t sits at key position t + S - T (bottom-right alignment) and sees the keys up
            to that position. ``False`` shows all keys. Depth slots are never masked.
        scale: factor on every score, within -1e30..1e30; default 1 / sqrt(D).
        window: ``(left, right)`` shows the keys within [position - left, position + right], both
            ends included, ``None`` on a side is unbounded; an int w means (w, w). Under ``causal``
            nothing on the right is visible whatever ``right`` says.
        softcap: c within 1e-7..1e30 replaces each score x, of both kinds, by c * tanh(x / c).
        plan: on a GPU, "fused" runs Triton kernels alone; "split" leaves the sequence to the
            library behind ``scaled_dot_product_attention`` and runs Triton kernels for depth;
            "auto" splits passes with much arithmetic in the sequence, where cuDNN takes them and
            was measured to be faster (``moda-ops doctor`` shows examples). cuDNN takes about a
            tenth of a second for each new shape: "fused" suits lengths that never repeat. Results
            are the same up to rounding; those of a split backward may differ from run to run, as
            the library's do, unless ``torch.use_deterministic_algorithms`` is on. Backward passes
            that a library cannot do, as of a gradient through ``lse``, are fused. On a CPU all
            plans are one.
        return_lse: also return ``lse``.

    Returns:
        ``out`` (B, T, HQ, DV) in q's dtype, contiguous; with ``return_lse`` the pair
        ``(out, lse)``, where ``lse`` is (B, HQ, T) in float32 (float64 for float64 inputs), natural
        logarithm. A row that sees nothing has out = 0, lse = -inf and zero gradients.

    Raises:
        TypeError: an argument is of the wrong type, or a tensor of an unsupported or other dtype,
            or an argument has another library's name; the text says what it is called here.
        ValueError: shapes, devices or strides that do not fit, an option outside its range, or
            ``plan="split"`` for a forward that no library covers (float32, a window, softcap,
            a scale that is not positive, a causal mask with S > T).

    Example:
        >>> import torch
        >>> from moda_ops import moda_attention
        >>> B, T, HQ, H, D = 2, 16, 4, 2, 32
        >>> q = torch.randn(B, T, HQ, D, requires_grad=True)
        >>> k, v = torch.randn(B, T, H, D), torch.randn(B, T, H, D)
        >>> slots = [torch.randn(B, T, H, D) for _ in range(3)]
        >>> out, lse = moda_attention(q, k, v, slots, slots, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 16, 4, 32]), torch.Size([2, 4, 16]))
        >>> out.sum().backward()
        >>> q.grad.shape
        torch.Size([2, 16, 4, 32])
    """
    check_tensors(q=q, k=k, v=v)
    check_option("scale", scale)
    check_option("softcap", softcap)
    check_bool("return_lse", return_lse)
    check_plan(plan)
    left, right = window_sides(window)
    out, lse = torch.ops.moda.attention(
        q,
        k,
        v,
        *slot_lists(k_depth, v_depth),
        causal=check_bool("causal", causal),
        scale=scale,
        window_left=left,
        window_right=right,
        softcap=softcap,
        plan=plan,
    )
    return (out, lse.to(sum_dtype(q))) if return_lse else out


def check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_bool(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, torch.SymBool):
        return bool(value)  # a mask is one or the other: a compiler guards on it
    raise TypeError(f"{name} must be a bool, got {_repr(value)}")


def check_int(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {_repr(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    _check_64_bits(name, value)
    return value  # type: ignore[return-value]


def _check_64_bits(name: str, value: object) -> None:
    """What PyTorch's operators take for an int."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits if it is an int, got {value}")


def check_option(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or None, got {_repr(value)}")
    _check_64_bits(name, value)


def _repr(value: object) -> str:
    """Of an argument that should be a Python number; NumPy's and tensors can become one."""
    return f"{value!r}; call .item()" if hasattr(value, "item") else repr(value)


def check_plan(value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"plan must be a string, got {value!r}")


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast casts tensors there; PyTorch raises on meta, where it has no autocast."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a layer computes in: autocast's where that applies, else its input's."""
    if dtype is not torch.float64 and autocast_enabled(device):
        return torch.get_autocast_dtype(device.type)
    return dtype


def slot_lists(
    k_depth: Depth | None, v_depth: Depth | None, axes: Axes = BATCHED
) -> tuple[list[Tensor], list[Tensor]]:
    """The operators' form of depth: L slots, or a list of one packed tensor."""
    check_both("k_depth", k_depth, "v_depth", v_depth)
    return _slot_list("k_depth", k_depth, axes), _slot_list("v_depth", v_depth, axes)


def _slot_list(name: str, depth: Depth | None, axes: Axes) -> list[Tensor]:
    slot, packed = f"({axes.queries}, H, D)", f"({axes.queries}, L, H, D)"
    if depth is None:
        return []
    if isinstance(depth, Tensor):
        if depth.dim() != axes.rank + 3:
            raise ValueError(
                f"{name} given as one tensor must be packed, {packed}, got "
                f"{depth.dim()} dimensions {tuple(depth.shape)}; a single slot goes in a list"
            )
        return [depth]
    if not isinstance(depth, (list, tuple)):
        raise TypeError(
            f"{name} must be a list of tensors {slot} or one packed tensor {packed}, "
            f"got {type(depth).__name__}"
        )
    for i, x in enumerate(depth):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != axes.rank + 2:
            raise ValueError(
                f"{name}[{i}] must be {slot}, got {x.dim()} dimensions "
                f"{tuple(x.shape)}; a packed tensor is given by itself, not in a list"
            )
    return list(depth)


def window_sides(window: Window | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    sides = (window, window) if isinstance(window, (int, torch.SymInt)) else window
    if not isinstance(sides, tuple) or len(sides) != 2:
        raise TypeError(
            f"window must be None, an int or a tuple (left, right), got {_repr(window)}"
        )
    for side in sides:
        if isinstance(side, bool) or not (side is None or isinstance(side, (int, torch.SymInt))):
            raise TypeError(f"window sides must be ints or None, got {_repr(side)}")
        if side is not None and side < 0:
            raise ValueError(f"window sides must be >= 0 (None is unbounded), got {window!r}")
        _check_64_bits("a window side", side)
    return sides
