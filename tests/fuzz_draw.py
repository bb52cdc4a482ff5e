"""What a case of ``tests/fuzz.py`` is drawn from, and the poisoned memory around its inputs."""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers import Inputs, make_inputs
from moda_ops import ops

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
        B=(1, 1, 2),
        T=(0, 1, 2, 3, 16, 17, 64, 129, 300),
        H=(1, 1, 2),
        G=(1, 2, 3, 5, 6, 7, 8, 16),
        D=(16, 24, 33, 64, 70, 80, 96, 128, 192, 256),
        L=(0, 1, 2, 7, 19, 72),
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
FAMILY = 16  # successive cases of one family, which on a GPU share the kernels that they compile


class Draw:
    """The choices of one case, by name, and the memory that its operators must leave alone.

    On a GPU the sizes that kernels are compiled for come from the family, seed // FAMILY, and half
    of the cases do not ask for determinism, so that a library may do their backward.
    """

    def __init__(self, kind: str, seed: int, device: str) -> None:
        family = seed // FAMILY if device == "cuda" else seed
        self.device, self.at = device, torch.device("cuda" if device == "cuda" else "cpu")
        self.random = random.Random(f"{kind} {seed}")
        self.family = random.Random(f"{kind} of family {family}")
        self.seed = self.random.randrange(2**31)  # of the numbers in tensors
        self.drawn: dict[str, Any] = {}
        self.memory: list[tuple[Tensor, Tensor, Tensor]] = []
        self.deterministic = device != "cuda" or self.chance("deterministic", 0.5)
        self.poison = self("poison", float("nan"), float("inf"), -float("inf"))

    def __call__(self, name: str, *options: Any) -> Any:
        self.drawn[name] = value = self.random.choice(options)
        return value

    def chance(self, name: str, share: float) -> bool:
        self.drawn[name] = value = self.random.random() < share
        return value

    def size(self, name: str, of: str | None = None) -> Any:
        source = self.family if name in ("dtype", "G", "D", "DV") else self.random
        self.drawn[name] = value = source.choice(SIZES[self.device][of or name])
        return value

    def shape(self, **fixed: Any) -> dict[str, Any]:
        """Keyword arguments of ``make_inputs``."""
        B, T, H, G, L = map(self.size, "BTHGL")
        D = DV = self.size("D")
        if self.family.random() < 0.3:
            DV = self.size("DV", of="D")
        other = self.random.choice(SIZES[self.device]["T"])
        S = self("S", T, T, T + 1, T + 9, other)
        shape = dict(B=B, T=T, HQ=G * H, H=H, D=D, L=L, S=S, DV=DV, dtype=self.size("dtype"))
        shape |= dict(form=self("form", "list", "packed")) | fixed
        self.drawn |= fixed
        return shape | dict(device=self.at, seed=self.seed)

    def options(self, *names: str) -> dict[str, Any]:
        """Those of the public functions that are named."""
        side = (None, 0, 1, 4, 30, *HUGE)
        sides = self.random.choice(side), self.random.choice(side)
        one = self.random.choice((0, 1, 5, *HUGE))
        choices = dict(
            causal=(True, False),
            window=(None, None, one, sides),
            scale=(None, None, 0.3, 1.0, -0.5, 0.0),
            softcap=(None, None, 1.5, 30.0, 0.1),
        )
        return {name: self(name, *choices[name]) for name in names}

    def place(self, x: Tensor, written: bool = False) -> Tensor:
        """x in larger, poisoned memory, with other strides and alignment; the last one stays 1.

        ``written`` says that the call may change x, though nothing around it.
        """
        repeated = [n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True)]
        core = x[tuple(slice(0, 1) if again else slice(None) for again in repeated)]
        order = [*self.random.sample(range(x.dim() - 1), x.dim() - 1), x.dim() - 1]
        pads = [self.random.choice(((0, 0), (0, 0), (1, 2), (0, 3))) for _ in order]
        sizes = [core.shape[dim] + sum(pads[dim]) for dim in order]
        offset, count = self.random.randrange(9), torch.Size(sizes).numel()
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

    def check_memory(self) -> None:
        for base, before, inside in self.memory:
            word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
            changed = (base.view(word) != before.view(word)) & ~inside
            assert not changed.any(), f"{changed.sum()} elements of or beside an input were written"

    def inputs(self, shape: dict[str, Any]) -> Inputs:
        """Random; some repeat along a dimension, have large logits, or ones for values."""
        inputs = make_inputs(**shape)
        if self.chance("repeated", 0.2):
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
        dlse = randn(B, HQ, T).to(ops.lse_dtype(inputs.q))
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
            assert out.dtype is inputs.q.dtype and lse.dtype is ops.lse_dtype(out)
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
