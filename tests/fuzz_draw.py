"""What a case of ``tests/fuzz.py`` is drawn from, and the poisoned memory around its inputs."""

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers import Inputs, make_inputs
from moda_ops.operators.checks import sum_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SIZES: dict[str, dict[str, tuple[Any, ...]]] = dict(
    cpu=dict(
        dtype=(*FLOATS, torch.float64),
        B=(1, 1, 2, 3),
        T=(0, 1, 2, 3, 7, 16, 33, 65),
        H=(1, 1, 2, 3),
        G=(1, 2, 3, 5, 6, 7, 8, 16),
        D=(1, 2, 3, 8, 16, 17, 33, 70),
        L=(0, 1, 2, 5, 19),
        document=(0, 1, 2, 5, 17),
        cached=(0, 3, 40, 130),
    ),
    cuda=dict(
        dtype=FLOATS,
        B=(1, 1, 2, 3),
        T=(0, 1, 2, 3, 16, 17, 64, 129, 300),
        H=(1, 1, 2),
        G=(1, 2, 3, 5, 6, 7, 8, 16),
        D=(16, 24, 33, 64, 64, 70, 80, 96, 128, 128, 192, 256),
        L=(0, 1, 2, 3, 5, 7, 9, 19, 72),
        document=(0, 1, 5, 17, 64, 130, 300),
        cached=(0, 3, 200, 3000),
    ),
    interpreter=dict(
        dtype=FLOATS[:2],
        B=(1, 1, 1, 2),
        T=(0, 1, 2, 3, 5, 18),
        H=(1, 1, 2),
        G=(1, 2, 3, 5),
        D=(1, 3, 8, 16, 17, 33),
        L=(0, 1, 2, 4),
        document=(0, 1, 2, 5),
        cached=(0, 3, 40, 130),
    ),
)
HUGE = (2**31 - 1, 2**31, 2**62, sys.maxsize)
COMPILED = (
    *("dtype", "B", "H", "G", "D", "DV", "other DV", "form", "unbound", "grad_dtype", "page"),
    *("left", "bounded", "capped", "rows", "offset", "dout", "in_dims", "N"),
)
"""Choices that kernels are compiled for. All cases of a family share them on a GPU."""

FAMILY = 2000  # successive cases: about as long as their kernels take to compile


class Draw:
    """The choices of one case, by name, and the memory that its operators must leave alone.

    On a GPU the COMPILED ones come from the family, seed // FAMILY, whatever the kind, and half
    of the cases do not ask for determinism, so that a library may do their backward.
    """

    def __init__(self, kind: str, seed: int, device: str) -> None:
        self.device, self.at = device, torch.device("cuda" if device == "cuda" else "cpu")
        self.random, self.family = random.Random(f"{kind} {seed}"), seed // FAMILY
        self.seed = self.random.randrange(2**31)  # of the numbers in tensors
        self.drawn: dict[str, Any] = {}
        self.memory: list[tuple[Tensor, Tensor, Tensor]] = []
        self.deterministic = device != "cuda" or self.chance("deterministic", 0.5)
        self.poison = self("poison", float("nan"), float("inf"), -float("inf"))
        self.rows = self("rows", "sixteens", "sixteens", "odd") if device == "cuda" else "any"

    def source(self, name: str) -> random.Random:
        if self.device == "cuda" and name in COMPILED:
            return random.Random(f"{name} of family {self.family}")
        return self.random

    def __call__(self, name: str, *options: Any) -> Any:
        self.drawn[name] = value = self.source(name).choice(options)
        return value

    def chance(self, name: str, share: float) -> bool:
        self.drawn[name] = value = self.source(name).random() < share
        return value

    def size(self, name: str, of: str | None = None) -> Any:
        return self(name, *SIZES[self.device][of or name])

    def head_dims(self) -> tuple[int, int]:
        D = self.size("D")
        return D, self.size("DV", of="D") if self.chance("other DV", 0.3) else D

    def tokens(self, n: int, *head_dims: int) -> int:
        """n or n + 1, so that no stride is a multiple of 16 for n = 16 alone."""
        return n | 1 if n and self.device == "cuda" and any(D % 16 for D in head_dims) else n

    def shape(self, **fixed: Any) -> dict[str, Any]:
        """Keyword arguments of ``make_inputs``."""
        B, T, H, G, L = map(self.size, "BTHGL")
        D, DV = self.head_dims()
        row = B * H * G * (D + DV)  # NumPy takes a while for large ones
        T = self.tokens(min(T, math.isqrt(200_000_000 // row)), D, DV)
        fixed["L"] = min(fixed.get("L", L), max(1, 8_000_000 // max(1, T * row)))
        other = self.random.choice(SIZES[self.device]["T"])
        S = self.tokens(self.random.choice((T, T, T + 1, T + 9, other)), D, DV)
        self.drawn |= dict(T=T, S=S)
        shape = dict(B=B, T=T, HQ=G * H, H=H, D=D, L=L, S=S, DV=DV, dtype=self.size("dtype"))
        shape |= dict(form=self("form", "list", "packed")) | fixed
        self.drawn |= fixed
        return shape | dict(device=self.at, seed=self.seed)

    def options(self, *names: str) -> dict[str, Any]:
        """Those of the public functions that are named.

        Kernels are compiled for which bounds there are, not for their values; causal is one.
        """
        left, capped = self.chance("left", 0.5), self.chance("capped", 0.5)
        bounded = self.chance("bounded", 0.7)
        causal = bounded and self.random.random() < 0.6
        sides: Any = [self.random.choice((0, 1, 4, 30, *HUGE)) for _ in range(2)]
        right = bounded and (not causal or self.random.random() < 0.4)
        window = sides[0] if left else None, sides[1] if right else None
        same = left and right and self.random.random() < 0.4
        options = dict(
            causal=causal,
            window=sides[0] if same else None if window == (None, None) else window,
            scale=self.random.choice((None, None, 0.3, 1.0, -0.5, 0.0)),
            softcap=self.random.choice((1.5, 30.0, 0.1)) if capped else None,
        )
        self.drawn |= (chosen := {name: options[name] for name in names})
        return chosen

    def place(self, x: Tensor, written: bool = False) -> Tensor:
        """x in larger, poisoned memory, with other strides and alignment; the last one stays 1.

        ``written`` says that the call may change x, though nothing around it.
        """
        repeated = [n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True)]
        core = x[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
        order = [*self.random.sample(range(x.dim() - 1), x.dim() - 1), x.dim() - 1]
        pads = [self._padding(n, last=dim == x.dim() - 1) for dim, n in enumerate(core.shape)]
        sizes = [core.shape[dim] + sum(pads[dim]) for dim in order]
        count, offset = torch.Size(sizes).numel(), self.random.randrange(9)
        if self.rows != "any":  # the family's first elements are all as far beyond 16 bytes
            strides = torch.empty(sizes, device="meta").stride()
            first = sum(pads[d][0] * n for d, n in zip(order, strides, strict=True))
            offset = (self("offset", 0, 0, 0, 1) - first) % 8
        base = x.new_full((offset + count + 8,), self.poison)
        view = base[offset : offset + count].view(sizes)
        view = view.permute([order.index(dim) for dim in range(x.dim())])
        for dim, (before, _) in enumerate(pads):
            view = view.narrow(dim, before, core.shape[dim])
        view.copy_(core)
        inside = torch.zeros_like(base, dtype=torch.bool)
        if written:
            inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        self.memory.append((base, base.clone(), inside))
        return view.expand(x.shape)

    def _padding(self, n: int, last: bool) -> tuple[int, int]:
        """Before and after n elements; Triton compiles for which strides are multiples of 16."""
        if self.rows == "odd":
            return self.random.choice(((0, 1), (1, 0), (1, 2)) if n % 2 == 0 else ((0, 0), (1, 1)))
        if self.rows == "sixteens" and last:
            return self.random.choice(((0, -n % 16), (-n % 16, 16)))
        return self.random.choice(((0, 0), (0, 0), (1, 2), (0, 3)))

    def check_memory(self) -> None:
        for base, before, inside in self.memory:
            word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
            changed = (base.view(word) != before.view(word)) & ~inside
            assert not changed.any(), f"{changed.sum()} elements of or beside an input were written"

    def inputs(self, shape: dict[str, Any]) -> Inputs:
        """Random; some repeat along a dimension, have large logits, or ones for values."""
        inputs = make_inputs(**shape)
        if self.rows != "odd" and self.chance("repeated", 0.2):
            inputs = inputs.map(self._repeat)
        large = (1, 1, 1, 1, 30, 1000 if shape["dtype"].itemsize > 2 else 1)
        inputs = inputs._replace(q=inputs.q * self("logits", *large))
        if self.chance("ones", 0.15):
            v_depth = [torch.ones_like(x) for x in inputs.v_depth]
            inputs = inputs._replace(v=torch.ones_like(inputs.v), v_depth=v_depth)
        return inputs

    def _repeat(self, x: Tensor) -> Tensor:
        dim = self.random.randrange(x.dim() - 1)
        return x.narrow(dim, 0, 1).expand_as(x) if x.shape[dim] else x

    def cotangents(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """dout (B, T, HQ, DV) in drawn strides, and dlse; zeros for one that is not passed."""
        (B, T, HQ, _), DV = inputs.q.shape, inputs.v.shape[-1]
        generator = torch.Generator().manual_seed(self.seed + 1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(inputs.q)

        dout = dict(
            dense=lambda: randn(B, T, HQ, DV),
            placed=lambda: self.place(randn(B, T, HQ, DV)),
            transposed=lambda: randn(B, DV, HQ, T).transpose(1, 3),
            row=lambda: randn(DV).expand(B, T, HQ, DV),
            number=lambda: randn(1).expand(B, T, HQ, DV),
        )[self("dout", "dense", "placed", "transposed", "row", "number")]()
        dlse = randn(B, HQ, T).to(sum_dtype(inputs.q))
        through = self("through", "both", "both", "out", "lse")
        dout = torch.zeros_like(dout) if through == "lse" else dout
        return dout, torch.zeros_like(dlse) if through == "out" else dlse

    def run(
        self, inputs: Inputs, call: Callable[..., Any], dout: Tensor, dlse: Tensor
    ) -> tuple[Tensor, Tensor, Inputs]:
        """out, lse and gradients of ``call`` on inputs placed in poisoned memory, perhaps twice."""
        placed = inputs.map(self.place)
        unbound = is_packed(inputs) and self.chance("unbound", 0.3)  # slots are views of one tensor
        passed = {"both": slice(2), "out": slice(1), "lse": slice(1, 2)}[self.drawn["through"]]
        L = len(inputs.k_depth)

        def once() -> list[Tensor]:
            given = leaves = placed.map(lambda x: x.detach().requires_grad_())
            if unbound:
                slots = [list(x.unbind(-3)) for x in (leaves.k_depth[0], leaves.v_depth[0])]
                given = Inputs(*leaves[:3], *slots)
            results = out, lse = call(given)
            assert out.dtype is inputs.q.dtype and lse.dtype is sum_dtype(out)
            assert out.is_contiguous() and lse.is_contiguous()
            grads = torch.autograd.grad(
                results[passed], leaves.leaves(), (dout, dlse)[passed], materialize_grads=True
            )
            return [out.detach(), lse.detach(), *grads]

        results = once()
        if self.deterministic and self.chance("again", 0.2):
            for a, b in zip(results, once(), strict=True):
                same = torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
                assert same, "two runs differ in their bits"
        out, lse, dq, dk, dv, *slots = results
        return out, lse, Inputs(dq, dk, dv, slots[:L], slots[L:])


def is_packed(x: Inputs) -> bool:
    return len(x.k_depth) == 1 and x.k_depth[0].dim() == x.q.dim() + 1


def depth(x: Inputs) -> tuple[Any, Any]:
    """k_depth and v_depth as the public functions take them."""
    return (x.k_depth[0], x.v_depth[0]) if is_packed(x) else (x.k_depth, x.v_depth)
