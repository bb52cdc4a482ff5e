"""Floating-point operations of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Two for each multiply-add of a matrix product. For each query head and each key that its query sees,
of the sequence or of depth, forward has D for the score and DV for the value::

    forward  = 2 * pairs * (D + DV)
    backward = 2 * pairs * (3 D + 2 DV)     # the score again, dp and dv; dq and dk

PyTorch's formulas for scaled_dot_product_attention do the same for pairs, except that they count
those that a causal mask hides. Lengths that are on the device, of packed documents and of caches,
are read from there, which waits for it; of fake tensors they are taken to be as large as can be.

An operator's description has its pairs. The formulas are registered when
``torch.utils.flop_counter`` is imported, and not before: it imports Triton where there is one.
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

from moda_ops import private

Pairs = Callable[..., int]
"""Takes an operator's arguments by name, and returns the pairs of one query head."""
FLOP_COUNTER = "torch.utils.flop_counter"
_PAIRS: dict[str, Pairs] = {}


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


def known_values(x: Tensor) -> list[int] | None:
    """What is in a tensor, if there is anything."""
    return None if private.holds_no_values(x) else x.tolist()


def known_documents(cu_seqlens: Sequence[Tensor], T: int, S: int) -> Iterator[tuple[int, int]]:
    """Queries and keys of each packed document; one has all if they are not known."""
    starts, key_starts = map(known_values, cu_seqlens)
    if starts is None or key_starts is None:
        yield T, S
    else:
        for (q0, q1), (k0, k1) in zip(pairwise(starts), pairwise(key_starts), strict=True):
            yield q1 - q0, k1 - k0


def _forward_flops(
    names: Sequence[str], pairs: Pairs, *arguments: Any, out_val: Any, **options: Any
) -> int:
    given = dict(zip(names, arguments, strict=False)) | options
    HQ, D = given["q"].shape[-2:]
    return 2 * HQ * pairs(**given) * (D + out_val[0].shape[-1])


def _backward_flops(
    names: Sequence[str], pairs: Pairs, *arguments: Any, out_val: Any, **options: Any
) -> int:
    given = dict(zip(names, arguments, strict=False)) | options
    HQ, D = given["q"].shape[-2:]
    return 2 * HQ * pairs(**given) * (3 * D + 2 * given["out"].shape[-1])


def register(name: str, pairs: Pairs) -> None:
    """Give ``moda::name`` its FLOPs, now or when ``torch.utils.flop_counter`` is imported."""
    _PAIRS[name] = pairs
    if FLOP_COUNTER in sys.modules:
        _register_formula(sys.modules[FLOP_COUNTER], name)


def _register_formula(flop_counter: ModuleType, name: str) -> None:
    target = getattr(torch.ops.moda, name)
    formula = _backward_flops if name.endswith("_backward") else _forward_flops
    names = [argument.name for argument in target.default._schema.arguments]
    flop_counter.register_flop_formula(target, get_raw=True)(partial(formula, names, _PAIRS[name]))


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
                for operator in _PAIRS:
                    _register_formula(module, operator)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Registration())
