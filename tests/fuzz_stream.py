"""Random programs over a depth stream: the part of ``tests/fuzz.py`` that several layers make."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fuzz_draw import SIZES, Draw
from helpers import Inputs, plain_attention
from moda_ops import DepthSlots, DepthStream

STEPS = (
    "block",
    "checkpoint",
    "write",
    "outside",
    "depth",
    "aside",
    "older",
    "keep",
    "read",
    "keys",
    "junk",
)
REFUSED = ("no_grad", "reentrant")  # steps that a stream may refuse, with an error that says so
AGAIN = "backward through the graph a second time"  # PyTorch, of DepthSlots in a reentrant block


@dataclasses.dataclass(frozen=True)
class DenseStream:
    """A depth stream as anybody would write it, over ``plain_attention``."""

    slots: tuple[tuple[Tensor, Tensor], ...] = ()

    def write(self, k: Tensor, v: Tensor) -> "DenseStream":
        return DenseStream((*self.slots, (k, v)))

    def keep(self, slots: list[int]) -> "DenseStream":
        return DenseStream(tuple(self.slots[i] for i in slots))

    def keys(self) -> list[Tensor]:
        return [k for k, _ in self.slots]

    def attend(
        self, q: Tensor, k: Any = None, v: Any = None, cu_seqlens: Any = None, **options: Any
    ) -> tuple[Tensor, "DenseStream"]:
        slots = self.slots
        if k is None:
            *slots, (k, v) = slots
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, q.shape[1]]), torch.tensor([0, k.shape[1]])
        outs = []
        for t, s in zip(*(itertools.pairwise(cu.tolist()) for cu in cu_seqlens), strict=True):
            t, s = slice(*t), slice(*s)
            depth = [k[:, t] for k, _ in slots], [v[:, t] for _, v in slots]
            outs.append(plain_attention(Inputs(q[:, t], k[:, s], v[:, s], *depth), **options)[0])
        return torch.cat(outs, 1), self

    def attend_depth(self, q: Tensor, **options: Any) -> tuple[Tensor, "DenseStream"]:
        k, v = self.slots[0]
        return self.attend(q, k[:, :0], v[:, :0], causal=False, **options)


class Program:
    """What a model does with its stream, step by step; every kind of stream can run it."""

    def __init__(self, draw: Draw, *, refused: bool) -> None:
        """Steps that are allowed where they stand; ``refused``: some that streams may refuse."""
        self.B, T = draw.size("B"), draw("T", *filter(None, SIZES[draw.device]["T"][:7]))
        (self.D, DV), self.H, G = draw.head_dims(), draw.size("H"), draw.size("G")
        self.DV, self.HQ, self.T = min(self.D, DV), self.H * G, draw.tokens(T, self.D, DV)
        names = STEPS + (draw("refused", *REFUSED),) * (refused and draw.chance("refuse", 0.2))
        cu = None
        if self.B == 1 and draw.chance("documents", 0.25):
            cu = [0, self.T // 3, self.T // 3, self.T]
            cu = (torch.tensor(cu, dtype=torch.int32, device=draw.at),) * 2
        self.steps: list[tuple[str, dict[str, Any]]] = []
        written, dropped = [0], False
        for _ in range(draw("steps", 2, 4, 7)):
            step, n = draw.random.choice(names), written[-1]
            if (step in ("depth", "keys") and n == 0) or (step == "read" and dropped):
                step = "block"
            options: dict[str, Any] = dict(scale=draw.random.choice((None, 0.4)))
            options["softcap"] = 2.0 if draw.chance("capped", 0.5) else None
            if step == "older":
                options["value"] = draw.random.randrange(len(written))
            elif step == "keep":
                slots = sorted(draw.random.sample(range(n), draw.random.randint(0, n)))
                options, dropped, n = dict(slots=slots), dropped or len(slots) < n, len(slots)
            elif step == "junk":
                options, dropped = dict(slots=list(range(n))), True
            elif step != "depth":
                window = draw.random.choice((0, 3)) if draw.chance("left", 0.5) else None
                options |= dict(window=window, cu_seqlens=cu)
            n += step in ("block", "checkpoint", "write", *REFUSED)
            written.append(n)
            self.steps.append((step, options))
        self.names = [step for step, _ in self.steps]
        draw.drawn["program"] = " ".join(f"{step}{o.get('slots', '')}" for step, o in self.steps)
        generator = torch.Generator().manual_seed(draw.seed)
        self.weights = torch.randn(len(self.steps), 3, self.D, generator=generator)
        self.junk, dtype = draw.poison, draw.size("dtype")
        shapes = (self.B, self.T, self.HQ, self.D), (self.B, self.T, self.H, self.DV)
        self.inputs = [torch.randn(x, generator=generator).to(draw.at, dtype) for x in shapes]
        grad_dtype = draw("grad_dtype", None, torch.float32) if dtype.itemsize == 2 else None
        self.options = dict(dtype=dtype, grad_dtype=grad_dtype, device=draw.at)

    def allocate(self) -> DepthStream:
        slots = len(self.steps)
        return DepthStream.allocate(slots, self.B, self.T, self.H, self.D, self.DV, **self.options)

    def run(self, new: Callable[[], Any], x: Tensor, y: Tensor) -> Tensor:
        """All outputs in one. x passes through the layers, y is added to all values."""
        stream: Any = new()
        older, outs = [stream], []

        def block(x: Tensor, y: Tensor, stream: Any, i: int) -> tuple[Tensor, Any]:
            q, k, v = parts(x, y, i)
            return stream.write(k, v).attend(q, **self.steps[i][1])

        def parts(x: Tensor, y: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (torch.sin(x * w.to(x)) for w in self.weights[i])
            return q, k[:, :, : self.H], v[:, :, : self.H, : self.DV] + y

        for i, (step, options) in enumerate(self.steps):
            (q, k, v), out = parts(x, y, i), None
            if step in ("checkpoint", "reentrant"):
                reentrant = step == "reentrant" and not isinstance(stream, DenseStream)
                out, stream = checkpoint(block, x, y, stream, i, use_reentrant=reentrant)
            elif step in ("block", "no_grad"):
                with torch.set_grad_enabled(step == "block" and torch.is_grad_enabled()):
                    out, stream = block(x, y, stream, i)
            elif step == "write":
                stream = stream.write(k, v)
            elif step == "outside":
                out, stream = stream.attend(q, k, v, **options)
            elif step == "depth":
                out, stream = stream.attend_depth(q, **options)
            elif step == "aside":  # the stream goes on without this reader
                out, _ = stream.attend(q, k, v, **options)
            elif step == "older":  # a value from before is read once more
                rest = {name: x for name, x in options.items() if name != "value"}
                out, _ = older[options["value"]].attend(q, k, v, **rest)
            elif step == "keys":
                out = stream.keys()[-1].detach().clone()
            elif step == "keep":
                stream = stream.keep(options["slots"])
            elif step == "junk":  # a slot that no layer reads
                k, v = (torch.full_like(like.detach(), self.junk) for like in (k, v))
                stream = stream.write(k, v).keep(options["slots"])
            elif isinstance(stream, DepthStream):  # "read": goes on in another stream
                slots, stream = stream.read(), new()
                for slot in slots:
                    stream = stream.write(*slot.split([self.D, self.DV], -1))
            older.append(stream)
            if out is not None:
                outs.append(out.flatten())
                x = x + 0.5 * torch.tanh(out[:, :, :1].sum(-1, keepdim=True))
        return torch.cat([x.flatten(), *outs])


def stream(draw: Draw) -> None:
    """DepthSlots and DepthStream beside the dense model, in float64 and in their own dtype."""
    program = Program(draw, refused=True)
    wanted = draw("gradients", (0, 1), (0,), (1,))
    again = draw.deterministic and draw.chance("again", 0.3)

    def results(new: Callable[[], Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [draw.place(x.to(dtype)).detach().requires_grad_() for x in program.inputs]
        out = program.run(new, *leaves)
        generator = torch.Generator().manual_seed(draw.seed + 1)
        of, dout = [leaves[i] for i in wanted], torch.randn(out.shape, generator=generator).to(out)
        if "reentrant" in program.names:  # PyTorch has no autograd.grad for it
            out.backward(dout)
            return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in of)]
        grads = torch.autograd.grad(out, of, dout, retain_graph=again, materialize_grads=True)
        if again:
            twice = torch.autograd.grad(out, of, dout, materialize_grads=True)
            assert all(map(torch.equal, grads, twice)), "a second backward gives other bits"
        return [out.detach(), *grads]

    dtype = program.options["dtype"]
    exact, plain = results(DenseStream, torch.float64), results(DenseStream, dtype)
    chance = 8  # steps amplify roundings, and a plain evaluation of few rows may have few of them
    roundings = len(program.steps) * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for kind, new in (("DepthSlots", DepthSlots), ("DepthStream", program.allocate)):
        try:
            actual = results(new, dtype)
        except (RuntimeError, ValueError) as error:
            if any(step in program.names and step in str(error) for step in REFUSED):
                continue
            if kind == "DepthSlots" and "reentrant" in program.names and AGAIN in str(error):
                continue
            raise
        names = "out", *(f"d{'xy'[i]}" for i in wanted)
        for name, a, e, p in zip(names, actual, exact, plain, strict=True):
            error, allowed = (a - e).norm(), chance * (p - e).norm() + roundings * e.norm()
            assert error <= allowed, f"{kind} {name}: error {error:.2e}, allowed {allowed:.2e}"
