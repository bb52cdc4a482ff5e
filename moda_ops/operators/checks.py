"""What the operators accept: one pass over the arguments, errors that name the argument."""

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from moda_ops.operators.slot_tensors import SlotTensors

if TYPE_CHECKING:
    from moda_ops.operators.options import Options

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


@lru_cache
def _symbols(layout: str) -> tuple[tuple[str, ...], str]:
    """A layout's symbols, and how errors write it."""
    symbols = tuple(layout.split())
    return symbols, f"({symbols[0]},)" if len(symbols) == 1 else f"({', '.join(symbols)})"


def shape_of(tensor: Tensor) -> str:
    """Its shape, as errors write it."""
    return "(" + ", ".join(str(n) for n in tensor.shape) + ")"


class Sizes:
    """What the symbols of layouts like ``"B T HQ D"`` stand for in one call.

    Every tensor has q's device, and stride 1 in its last dimension. The first tensor with a symbol
    in its layout says how large it is.
    """

    def __init__(self, q: Tensor, layout: str) -> None:
        device = q.device.type
        if device not in DTYPES:
            raise ValueError(f"q must be on a cpu, cuda or meta device, got {q.device}")
        if q.dtype not in DTYPES[device]:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[device])
            raise TypeError(f"q must have one of the dtypes {allowed} on {device}, got {q.dtype}")
        self.q, self.dtype, self.device = q, q.dtype, q.device
        self.known: dict[str, int] = {}
        self.bind("q", q, layout)

    def __getitem__(self, symbol: str) -> int:
        return self.known[symbol]

    def shape(self, layout: str) -> tuple[int, ...]:
        """Of a tensor of this layout, whose symbols are all known."""
        return tuple(self.known[symbol] for symbol in _symbols(layout)[0])

    def bind(self, name: str, x: Tensor, layout: str, dtype: torch.dtype | None = None) -> None:
        """Raise unless x fits the layout and has this dtype, by default q's."""
        (symbols, dims), known, shape = _symbols(layout), self.known, x.shape
        dtype = self.dtype if dtype is None else dtype
        if len(shape) != len(symbols):
            raise ValueError(f"{name} must have shape {dims}, got {shape_of(x)}")
        fits = x.dtype is dtype and x.device == self.device and x.stride(-1) == 1
        for symbol, size in zip(symbols, shape, strict=True):
            fits = known.setdefault(symbol, size) == size and fits
        if not fits:
            check_like(name, x, self.shape(layout), dims, dtype, self.device)
            check_last_stride(name, x)

    def bind_indices(self, name: str, x: Tensor, layout: str) -> None:
        """:meth:`bind` for int32."""
        if x.dtype is not torch.int32:
            raise TypeError(f"{name} must have dtype torch.int32, got {x.dtype}; call .int()")
        self.bind(name, x, layout, torch.int32)

    def bind_keys(self, k: Tensor, v: Tensor, k_layout: str, v_layout: str) -> None:
        """A sequence's keys and values."""
        self.bind("k", k, k_layout)
        self.bind("v", v, v_layout)
        self.check_heads("k", "v")

    def check_heads(self, k: str, v: str) -> None:
        """Raise unless query heads come in groups; k and v are the arguments' names."""
        HQ, H = self["HQ"], self["H"]
        if H == 0 or HQ == 0 or HQ % H:
            raise ValueError(
                f"q's heads must be a positive multiple of {k}'s, got HQ = {HQ} and H = {H}; "
                "heads are the second to last dimension"
            )
        for name, dim in (("q", self["D"]), (v, self["DV"])):
            if not 1 <= dim <= MAX_HEAD_DIM:
                raise ValueError(f"{name}'s head dim must be within 1..{MAX_HEAD_DIM}, got {dim}")

    def bind_depth(self, k_depth: list[Tensor], v_depth: list[Tensor], tokens: str) -> None:
        """Depth keys and values, whose layouts begin with those of ``tokens``."""
        if not k_depth and not v_depth:
            return
        axes = len(_symbols(tokens)[0])
        k, v = SlotTensors.of(k_depth, axes), SlotTensors.of(v_depth, axes)
        if k.packed != v.packed:
            raise ValueError(
                "k_depth and v_depth must both be lists of slots or both packed tensors, "
                f"got {k} and {v}"
            )
        if len(k_depth) != len(v_depth):
            raise ValueError(
                "k_depth and v_depth must have the same number of slots, "
                f"got {len(k_depth)} and {len(v_depth)}"
            )
        self.bind_slots("k_depth", k, f"{tokens} H D")
        self.bind_slots("v_depth", v, f"{tokens} H DV")

    def bind_slots(self, name: str, depth: SlotTensors, layout: str) -> None:
        """One of the two, in slots of this layout."""
        if depth.packed:
            *tokens, H, D = _symbols(layout)[0]
            return self.bind(name, depth.tensors[0], " ".join([*tokens, "L", H, D]))
        if not depth.tensors:
            return None
        if not self.known.keys() >= {*_symbols(layout)[0]}:
            self.bind(f"{name}[0]", depth.tensors[0], layout)
        shape, dtype, device = self.shape(layout), self.dtype, self.device
        for i, x in enumerate(depth.tensors):  # there may be hundreds: the cheapest test first
            fits = x.shape == shape and x.dtype is dtype and x.device == device
            if not (fits and x.stride(-1) == 1):
                self.bind(f"{name}[{i}]", x, layout)


def check_like(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dims: str,
    dtype: torch.dtype,
    device: torch.device,
    whose: str = "q",
) -> None:
    """Raise unless the tensor has this shape, dtype and device, which are those of ``whose``."""
    if tensor.shape != shape:
        expected = ", ".join(str(n) for n in shape)
        raise ValueError(f"{name} must have shape {dims} = ({expected}), got {shape_of(tensor)}")
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must have dtype {dtype} to fit {whose}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {whose}'s device {device}, got {tensor.device}")


def check_last_stride(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
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
) -> Sizes:
    """The sizes of a call of ``moda::attention``; raise if its arguments do not fit together."""
    sizes = Sizes(q, "B T HQ D")
    sizes.bind_keys(k, v, "B S H D", "B S H DV")
    sizes.bind_depth(k_depth, v_depth, "B T")
    check_options(options)
    return sizes


def check_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: list[Tensor],
    v_depth: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: "Options",
) -> Sizes:
    """The same of ``moda::attention_varlen``."""
    sizes = Sizes(q, "total_q HQ D")
    sizes.bind_keys(k, v, "total_k H D", "total_k H DV")
    sizes.bind_depth(k_depth, v_depth, "total_q")
    check_options(options)
    check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
    return sizes


def check_depth_attention(
    q: Tensor, k_depth: list[Tensor], v_depth: list[Tensor], options: "Options"
) -> Sizes:
    """The same of ``moda::depth_attention``."""
    sizes = Sizes(q, "B T HQ D")
    sizes.bind_depth(k_depth, v_depth, "B T")
    for symbol, default in (("H", "HQ"), ("DV", "D")):  # an empty list does not say
        sizes.known.setdefault(symbol, sizes[default])
    sizes.check_heads("k_depth", "v_depth")
    check_options(options)
    return sizes


def check_depth_mass(q: Tensor, k_depth: list[Tensor], lse: Tensor, options: "Options") -> Sizes:
    """The same of ``moda::depth_mass``."""
    sizes, slots = Sizes(q, "B T HQ D"), SlotTensors.of(k_depth)
    sizes.bind_slots("k_depth", slots, "B T H D")
    sizes.known |= dict(L=slots.number, DV=sizes["D"], H=sizes.known.get("H", sizes["HQ"]))
    sizes.check_heads("k_depth", "q")
    check_like("lse", lse, sizes.shape("B HQ T"), "(B, HQ, T)", mass_lse_dtype(q, lse), q.device)
    check_options(options)
    return sizes


def check_backward(
    sizes: Sizes,
    layouts: tuple[str, str],
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Raise unless the forward's results, in these layouts, and their gradients fit the call."""
    wide = lse_dtype(sizes.q)
    for name, tensor, layout, dtype in (
        ("dout", dout, layouts[0], None),
        ("out", out, layouts[0], None),
        ("dlse", dlse, layouts[1], wide),
        ("lse", lse, layouts[1], wide),
    ):
        if tensor is not None:
            shape, dims = sizes.shape(layout), _symbols(layout)[1]
            check_like(name, tensor, shape, dims, dtype or sizes.dtype, sizes.device)
    for name, tensor in (("out", out), ("lse", lse)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, as the forward returned it, got strides "
                f"{tuple(tensor.stride())}"
            )


def check_both(name: str, x: object, other: str, y: object) -> None:
    if (x is None) != (y is None):
        given, missing = (name, other) if y is None else (other, name)
        raise ValueError(f"{given} is given but {missing} is None; give both or neither")


def check_cu_seqlens(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor) -> None:
    """Raise unless these can bound documents; their values stay on their device, unread."""
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dim() != 1 or cu.shape[0] == 0:
            raise ValueError(f"{name} must have shape (documents + 1,), got {shape_of(cu)}")
        if cu.dtype is not torch.int32:
            raise TypeError(f"{name} must have dtype torch.int32, got {cu.dtype}; call .int()")
        check_like(name, cu, cu.shape, "(documents + 1,)", torch.int32, q.device)
        check_last_stride(name, cu)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have the same length, documents + 1, got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )


def check_options(options: "Options") -> None:
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
) -> Sizes:
    """The same of ``moda::decode`` or ``moda::decode_``."""
    pages = "B S_max" if block_table is None else "pages page_size"
    sizes = Sizes(q, "B N HQ D")
    sizes.bind("k_cache", k_cache, f"{pages} H D")
    sizes.bind("v_cache", v_cache, f"{pages} H DV")
    sizes.check_heads("k_cache", "v_cache")
    sizes.bind_depth(k_depth, v_depth, "B N")
    sizes.bind_indices("cache_seqlens", cache_seqlens, "B")
    if block_table is None:
        capacity, names = sizes["S_max"], "S_max"
    else:
        sizes.bind_indices("block_table", block_table, "B max_pages")
        if sizes["page_size"] == 0:
            raise ValueError("k_cache must have a page_size of at least 1, got 0")
        capacity, names = sizes["page_size"] * sizes["max_pages"], "page_size * max_pages"
    if capacity > MAX_CAPACITY:
        raise ValueError(
            f"{names} must be at most {MAX_CAPACITY}: positions are int32, got {capacity}"
        )
    if k_new is not None and v_new is not None:
        sizes.bind("k_new", k_new, "B N H D")
        sizes.bind("v_new", v_new, "B N H DV")
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if any(
                stride == 0 and n > 1 for stride, n in zip(cache.stride(), cache.shape, strict=True)
            ):
                raise ValueError(
                    f"{name} is written to and must not repeat its memory, got strides "
                    f"{tuple(cache.stride())} for shape {shape_of(cache)}"
                )
    check_options(options)
    return sizes
