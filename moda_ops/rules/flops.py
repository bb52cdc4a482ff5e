"""Floating-point operations of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Two for each multiply-add of a matrix product. For each query head and each key that its query sees,
of the sequence or of depth, forward has D for the score and DV for the value::

    forward  = 2 * pairs * (D + DV)
    backward = 2 * pairs * (3 D + 2 DV)     # the score again, dp and dv; dq and dk

PyTorch's formulas for scaled_dot_product_attention do the same for pairs, except that they count
those that a causal mask hides. Lengths that are on the device, of packed documents and of caches,
are read from there, which waits for it; of fake tensors they are taken to be as large as can be.

The formulas are registered when ``torch.utils.flop_counter`` is imported, and not before: it
imports Triton where there is one.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moda_ops.operators.checks import slots_left


def visible_pairs(
    T: int, S: int, left: int | None, right: int | None, first: int | None = None
) -> int:
    """How many of the T * S pairs a band shows: query t, at position p = first + t, sees the keys
    p - left to p + right of 0 .. S - 1. ``first`` is S - T unless given.

    Example:
        >>> visible_pairs(3, 5, left=None, right=0)  # causal
        12
        >>> visible_pairs(3, 5, left=1, right=1)
        8
    """
    first = S - T if first is None else first

    def up_to(x: int) -> int:
        """The sum over y <= x of y's distance into 0 .. S."""
        return sum(n * (n + 1) // 2 * sign for n, sign in ((max(x, 0), 1), (max(x - S, 0), -1)))

    def before(start: int) -> int:
        """Keys before start + t, summed over t."""
        return up_to(start + T - 1) - up_to(start - 1)

    shown = T * S if right is None else before(first + right + 1)
    return shown if left is None else shown - before(first - left)


def _slots(depth: list[Tensor], packed_rank: int = 5) -> int:
    packed = len(depth) == 1 and depth[0].dim() == packed_rank
    return depth[0].shape[-3] if packed else len(depth)


def _values(x: Tensor) -> list[int] | None:
    """What is in a tensor, if there is anything."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    unknown = isinstance(x, (FakeTensor, FunctionalTensor)) or x.device.type == "meta"
    return None if unknown else x.tolist()


def _documents(cu_seqlens: Sequence[Tensor], T: int, S: int) -> Iterator[tuple[int, int]]:
    """Queries and keys of each packed document; one has all if they are not known."""
    starts, key_starts = map(_values, cu_seqlens)
    if starts is None or key_starts is None:
        yield T, S
    else:
        for (q0, q1), (k0, k1) in zip(pairwise(starts), pairwise(key_starts), strict=True):
            yield q1 - q0, k1 - k0


def _attention_pairs(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    causal: bool = True,
    window_left: int | None = None,
    window_right: int | None = None,
    **_: Any,
) -> int:
    (B, T), S = q.shape[:2], k.shape[1]
    right = 0 if causal else window_right
    return B * (visible_pairs(T, S, window_left, right) + T * _slots(k_depth))


def _varlen_pairs(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    window_left: int | None = None,
    window_right: int | None = None,
    **_: Any,
) -> int:
    T, S, right = q.shape[0], k.shape[0], 0 if causal else window_right
    documents = _documents((cu_seqlens_q, cu_seqlens_k), T, S)
    sequence = sum(visible_pairs(t, s, window_left, right) for t, s in documents)
    return sequence + T * _slots(k_depth, 4)


def _depth_pairs(q: Tensor, k_depth: list[Tensor], **_: Any) -> int:
    B, T = q.shape[:2]
    return B * T * _slots(k_depth)


def _chunk_pairs(
    q: Tensor,
    k: Tensor,
    k_depth: list[Tensor],
    chunk_size: int,
    window_left: int | None = None,
    **_: Any,
) -> int:
    (B, T), S = q.shape[:2], k.shape[1]
    whole, rest = divmod(T, chunk_size)
    tokens = whole * visible_pairs(chunk_size, chunk_size, None, 0)
    tokens += visible_pairs(rest, rest, None, 0)
    return B * (visible_pairs(T, S, window_left, 0) + tokens * _slots(k_depth))


def _decode_pairs(
    q: Tensor,
    k_cache: Tensor,
    k_depth: list[Tensor],
    cache_seqlens: Tensor,
    k_new: Tensor | None = None,
    block_table: Tensor | None = None,
    window_left: int | None = None,
    **_: Any,
) -> int:
    B, N = q.shape[:2]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    new = 0 if k_new is None else N
    known = _values(cache_seqlens)
    lengths = [capacity] * B if known is None else [n + new for n in known]
    sequence = sum(visible_pairs(N, min(n, capacity), window_left, 0, n - N) for n in lengths)
    return sequence + B * N * _slots(k_depth)


def _stream_pairs(
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
        documents = _documents((cu_seqlens_q, cu_seqlens_k), T, S)
    return sum(visible_pairs(t, s, window_left, right) for t, s in documents) + B * T * depth


PAIRS: dict[str, tuple[Callable[..., int], bool]] = {
    "attention": (_attention_pairs, True),
    "attention_varlen": (_varlen_pairs, True),
    "chunk_attention": (_chunk_pairs, True),
    "depth_attention": (_depth_pairs, True),
    "stream_attention": (_stream_pairs, True),
    "decode": (_decode_pairs, False),
    "decode_": (_decode_pairs, False),
}
"""The pairs of one query head, by operator, and whether it has a backward."""


def _forward_flops(
    names: Sequence[str], pairs: Callable[..., int], *arguments: Any, out_val: Any, **options: Any
) -> int:
    given = dict(zip(names, arguments, strict=False)) | options
    HQ, D = given["q"].shape[-2:]
    return 2 * HQ * pairs(**given) * (D + out_val[0].shape[-1])


def _backward_flops(
    names: Sequence[str], pairs: Callable[..., int], *arguments: Any, out_val: Any, **options: Any
) -> int:
    given = dict(zip(names, arguments, strict=False)) | options
    HQ, D = given["q"].shape[-2:]
    return 2 * HQ * pairs(**given) * (3 * D + 2 * given["out"].shape[-1])


def _register(flop_counter: ModuleType) -> None:
    for name, (pairs, has_backward) in PAIRS.items():
        for op, formula in ((name, _forward_flops), (f"{name}_backward", _backward_flops)):
            if op == name or has_backward:
                target = getattr(torch.ops.moda, op)
                names = [argument.name for argument in target.default._schema.arguments]
                flop_counter.register_flop_formula(target, get_raw=True)(
                    partial(formula, names, pairs)
                )


class _Registration(MetaPathFinder):
    """Finds ``torch.utils.flop_counter`` as it would be found without, and registers after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != FLOP_COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


FLOP_COUNTER = "torch.utils.flop_counter"
if FLOP_COUNTER in sys.modules:
    _register(sys.modules[FLOP_COUNTER])
sys.meta_path.insert(0, _Registration())
