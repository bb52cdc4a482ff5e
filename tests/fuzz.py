"""Random calls of every operator against the NumPy reference or a dense float64 model.

    python tests/fuzz.py --seconds 60 --seed 1 --device cpu
    python tests/fuzz.py --device cpu --case attention:1234567

A kind and an integer determine a case: all its choices are drawn from generators that these two
seed. "cuda" runs the compiled kernels, "cpu" the eager implementation, and "interpreter" the
kernels on CPU tensors. Each failure is one line that says how to run the case again.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moda_ops
import moda_reference
from helpers import (
    Inputs,
    assert_decodes,
    assert_matches_reference,
    make_decoding,
    make_inputs,
    plain_attention,
)
from moda_ops import DepthSlots, DepthStream, decode, ops
from operators import BACKWARD, DIFFERENTIABLE, make_call
from test_batching import SIZE, loop, mapped_arguments
from test_depth_mass import assert_mass

DEVICES = ("cpu", "cuda", "interpreter")
DTYPES = dict(
    cpu=(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    cuda=(torch.bfloat16, torch.float16, torch.float32),
    interpreter=(torch.float32, torch.float16),
)
TOKENS = dict(
    cpu=(0, 1, 2, 3, 7, 16, 33, 65),
    cuda=(0, 1, 2, 3, 16, 17, 64, 129, 300, 1000),
    interpreter=(0, 1, 2, 3, 5, 18),
)
HEAD_DIMS = dict(
    cpu=(1, 2, 3, 8, 16, 17, 33, 70),
    cuda=(16, 24, 33, 64, 70, 80, 96, 128, 192, 256),
    interpreter=(1, 3, 8, 16, 17, 33),
)
GROUPS = dict(cpu=(1, 2, 3, 5, 6, 7, 8, 16), cuda=(1, 2, 3, 5, 6, 7, 8, 16), interpreter=(1, 2, 3, 5))
SLOTS = dict(cpu=(0, 1, 2, 5, 19), cuda=(0, 1, 2, 7, 19, 72), interpreter=(0, 1, 2, 5))
HUGE = (2**31 - 1, 2**31, 2**62, sys.maxsize)
FAMILY = 16  # successive CUDA cases that share head dims, group and dtype, and so compiled kernels


class Draw:
    """The choices of one case, by name, and the memory that its operators must leave alone."""

    def __init__(self, kind: str, seed: int, device: str) -> None:
        self.device, self.at = device, torch.device("cuda" if device == "cuda" else "cpu")
        family = seed // FAMILY if device == "cuda" else seed
        self.random, self.family = random.Random(f"{kind} {seed}"), random.Random(f"{kind} {family}.")
        self.seed = self.random.randrange(2**31)
        self.drawn: dict[str, Any] = {}
        self.memory: list[tuple[Tensor, Tensor, Tensor]] = []
        self.poison = self("poison", float("nan"), float("inf"), -float("inf"))

    def __call__(self, name: str, *options: Any, family: bool = False) -> Any:
        self.drawn[name] = value = (self.family if family else self.random).choice(options)
        return value

    def chance(self, name: str, share: float) -> bool:
        self.drawn[name] = value = self.random.random() < share
        return value

    def shape(self, **fixed: Any) -> dict[str, Any]:
        """Keyword arguments of ``make_inputs``."""
        d = self.device
        H, G = self("H", 1, 1, 2, 3), self("G", *GROUPS[d], family=True)
        D = self("D", *HEAD_DIMS[d], family=True)
        T = self("T", *TOKENS[d])
        longer = T + self("extra", 1, 3, 40 if d != "interpreter" else 9)
        S = self("S", T, T, longer, self.random.choice(TOKENS[d]))
        DV = self("DV", D, D, self.family.choice(HEAD_DIMS[d]), family=True)
        dtype = self("dtype", *DTYPES[d], family=True)
        shape = dict(B=self("B", 1, 1, 2, 3), T=T, HQ=G * H, H=H, D=D, DV=DV, S=S, dtype=dtype)
        shape |= dict(L=self("L", *SLOTS[d]), form=self("form", "list", "packed"))
        shape |= dict(device=self.at, seed=self.seed) | fixed
        self.drawn |= fixed
        return shape

    def options(self, *without: str) -> dict[str, Any]:
        side = lambda: self.random.choice((None, 0, 1, 4, 30, *HUGE))  # noqa: E731
        drawn = dict(
            causal=self("causal", True, False),
            window=self("window", None, None, self.random.choice((0, 1, 5, *HUGE)), (side(), side())),
            scale=self("scale", None, None, 0.3, 1.0, -0.5, 0.0),
            softcap=self("softcap", None, None, 1.5, 30.0, 0.1),
        )
        return {name: value for name, value in drawn.items() if name not in without}

    def place(self, x: Tensor, written: bool = False) -> Tensor:
        """x in larger, poisoned memory, with other strides and alignment; the last one stays 1.

        ``written`` says that the call may change x itself.
        """
        one = [slice(0, 1) if n > 1 and s == 0 else slice(None) for n, s in zip(x.shape, x.stride())]  # noqa: B905
        core = x[tuple(one)]
        order = self.random.sample(range(x.dim() - 1), x.dim() - 1) + [x.dim() - 1]
        if self.random.random() < 0.3:
            order = sorted(order)
        pads = [self.random.choice(((0, 0), (0, 0), (1, 2), (0, 3))) for _ in order]
        sizes = [core.shape[i] + sum(pads[i]) for i in order]
        offset, count = self.random.randrange(9), torch.Size(sizes).numel()
        base = x.new_full((offset + count + 8,), self.poison)
        view = base[offset : offset + count].view(sizes).permute([order.index(i) for i in range(x.dim())])
        inside = torch.zeros_like(base, dtype=torch.bool)
        for i, (before, _) in enumerate(pads):
            view = view.narrow(i, before, core.shape[i])
        view.copy_(core)
        if written:
            inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        self.memory.append((base, base.clone(), inside))
        return view.expand(x.shape)

    def check_memory(self) -> None:
        for base, before, inside in self.memory:
            word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
            same = (base.view(word) == before.view(word)) | inside
            assert same.all(), f"{(~same).sum()} elements of an input, or around one, were written"

    def cotangents(self, *out_shape: int, lse_shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """dout in drawn strides, and dlse; one of the two may be zeros, that is, not passed."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        make = lambda *shape: torch.randn(shape, generator=generator).to(like)  # noqa: E731
        layout = self("dout", "dense", "one", "rows", "transposed", "placed")
        if layout == "one":
            dout = make(1).expand(out_shape)
        elif layout == "rows":
            dout = make(out_shape[-1]).expand(out_shape)
        elif layout == "transposed":
            dout = make(*out_shape[::-1]).permute(*range(len(out_shape) - 1, -1, -1))
        else:
            dout = make(*out_shape)
            dout = self.place(dout) if layout == "placed" else dout
        dlse = make(*lse_shape).to(ops.lse_dtype(like))
        through = self("through", "both", "both", "out", "lse")
        return (
            torch.zeros_like(dout) if through == "lse" else dout,
            torch.zeros_like(dlse) if through == "out" else dlse,
        )


def known(options: dict[str, Any], T: int, S: int) -> dict[str, Any]:
    """The same options with windows as small as they can be, for the reference."""

    def small(side: int | None) -> int | None:
        return None if side is None else min(side, T + S)

    window = options.get("window")
    sides = tuple(map(small, window)) if isinstance(window, tuple) else small(window)
    return options | dict(window=sides) if "window" in options else options


def depth(x: Inputs) -> tuple[Any, Any]:
    """k_depth and v_depth as the public functions take them."""
    if len(x.k_depth) == 1 and x.k_depth[0].dim() == x.q.dim() + 1:
        return x.k_depth[0], x.v_depth[0]
    return x.k_depth, x.v_depth


def make(draw: Draw, shape: dict[str, Any]) -> Inputs:
    """Random inputs: some repeat along a dimension, have large logits, or ones for values."""
    inputs = make_inputs(**shape)
    if draw.chance("repeated", 0.2):

        def repeat(x: Tensor) -> Tensor:
            dim = draw.random.randrange(x.dim() - 1)
            return x.narrow(dim, 0, 1).expand_as(x) if x.shape[dim] else x

        inputs = inputs.map(repeat)
    large = (1, 1, 1, 1, 30) + ((1000,) if shape["dtype"].itemsize > 2 else ())
    inputs = inputs._replace(q=inputs.q * draw("logits", *large))
    if draw.chance("ones", 0.15):
        ones = [torch.ones_like(x) for x in inputs.v_depth]
        inputs = inputs._replace(v=torch.ones_like(inputs.v), v_depth=ones)
    return inputs


def run(
    draw: Draw, inputs: Inputs, call: Callable[..., tuple[Tensor, Tensor]], dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Inputs]:
    """out, lse and the gradients of ``call`` on inputs placed in poisoned memory, perhaps twice."""
    placed = inputs.map(draw.place) if draw.chance("placed", 0.8) else inputs.map(torch.clone)
    if isinstance(depth(placed)[0], Tensor) and draw.chance("unbound", 0.3):  # slices of one tensor
        slots = [list(x.unbind(-3)) for x in depth(placed)]
        call_ = lambda x: call(x._replace(k_depth=slots_of(x.k_depth), v_depth=slots_of(x.v_depth)))  # noqa: E731
        slots_of = lambda packed: list(packed[0].unbind(-3))  # noqa: E731
        del slots
    else:
        call_ = call

    def once() -> tuple[Tensor, Tensor, Inputs]:
        leaves = placed.map(lambda x: x.detach().requires_grad_())
        out, lse = call_(leaves)
        assert out.dtype is inputs.q.dtype and lse.dtype is ops.lse_dtype(out)
        assert out.is_contiguous() and lse.is_contiguous()
        passed = {"both": slice(2), "out": slice(1), "lse": slice(1, 2)}[draw.drawn["through"]]
        grads = torch.autograd.grad(
            (out, lse)[passed], leaves.leaves(), (dout, dlse)[passed], materialize_grads=True
        )
        L = len(leaves.k_depth)
        return out.detach(), lse.detach(), Inputs(*grads[:3], list(grads[3 : 3 + L]), list(grads[3 + L :]))

    results = once()
    exact = draw.device != "cuda" or draw.drawn.get("plan", "fused") == "fused"
    if exact and draw.chance("again", 0.2):
        for a, b in zip(_flat(results), _flat(once()), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), "two runs differ in their bits"
    return results


def _flat(results: tuple[Tensor, Tensor, Inputs]) -> list[Tensor]:
    return [*results[:2], *results[2].leaves()]


def check(draw: Draw, inputs: Inputs, call: Callable[..., Any], options: dict[str, Any]) -> None:
    """One batched call, forward and backward; keys that no query sees are poisoned for it."""
    (B, T, HQ, _), S, DV = inputs.q.shape, inputs.k.shape[1], inputs.v.shape[-1]
    options = known(options, T, S)
    given = inputs
    if draw.chance("unseen", 0.5):
        seen = moda_reference.visible(T, S, options.get("causal", True), options.get("window"))
        hidden = ~torch.from_numpy(seen.any(0)).to(draw.at)[:, None, None]
        k, v = (x.masked_fill(hidden, draw.poison) for x in (inputs.k, inputs.v))
        given = inputs._replace(k=k, v=v)
    cotangents = draw.cotangents(B, T, HQ, DV, lse_shape=(B, HQ, T), like=inputs.q)
    out, lse, grads = run(draw, given, call, *cotangents)
    if draw.drawn["ones"]:
        check_normalised(out, lse, S + T * (draw.drawn["L"]))
    options = {name: value for name, value in options.items() if value is not None}
    assert_matches_reference(
        inputs, lambda *_: (out, lse, grads), cotangents, stored=True, **options
    )


def check_normalised(out: Tensor, lse: Tensor, keys: int) -> None:
    """Values of one give one, however large the logits: only sums and stored numbers are rounded."""
    error = (out.double() - 1).abs().amax(-1)[lse.transpose(-1, -2).isfinite()]
    bound = (keys + 8) * torch.finfo(torch.float32).eps + 2 * torch.finfo(out.dtype).eps
    assert (error <= bound).all(), f"probabilities sum to 1 +- {error.max():.2e}, allowed {bound:.2e}"


def attention(draw: Draw) -> None:
    inputs, options = make(draw, draw.shape()), draw.options()
    plan = draw("plan", "auto", "fused", "split")

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        try:
            return moda_ops.moda_attention(*x[:3], *depth(x), **options, plan=plan, return_lse=True)
        except ValueError as error:
            if plan != "split" or "plan" not in str(error):  # what no library covers is refused
                raise
            return moda_ops.moda_attention(*x[:3], *depth(x), **options, return_lse=True)

    check(draw, inputs, call, options)


def chunk_attention(draw: Draw) -> None:
    inputs, options = make(draw, draw.shape()), draw.options("causal")
    options["chunk_size"] = C = draw("C", 1, 2, 3, 7, 16, 1000)

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        rest = {name: value for name, value in options.items() if name != "chunk_size"}
        return moda_ops.moda_chunk_attention(*x[:3], *depth(x), C, **rest, return_lse=True)

    check(draw, inputs, call, options)


def depth_attention(draw: Draw) -> None:
    shape = draw.shape(S=0)
    shape["L"] = draw.drawn["L"] = max(shape["L"], 1)
    options = draw.options("causal", "window")

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        return moda_ops.moda_depth_attention(x.q, *depth(x), **options, return_lse=True)

    check(draw, make(draw, shape), call, options)


def varlen(draw: Draw) -> None:
    """Documents of all sorts, and a padded end that may be poisoned."""
    lengths = (0, 1, 2, 5, 17) if draw.device != "cuda" else (0, 1, 5, 17, 64, 130, 300)
    count = draw("documents", 0, 1, 2, 3, 5)
    queries = draw.drawn["queries"] = [draw.random.choice(lengths) for _ in range(count)]
    same = draw("keys", "own", "queries") == "queries"
    keys = queries if same else [draw.random.choice(lengths) for _ in range(count)]
    draw.drawn["keys"] = keys
    ends = [0, *itertools.accumulate(queries)], [0, *itertools.accumulate(keys)]
    pads = draw("padding", (0, 0), (3, 0), (0, 4), (20, 20), (1, 2))
    T, S = ends[0][-1] + pads[0], ends[1][-1] + pads[1]
    inputs = make(draw, draw.shape(B=1, T=T, S=S))
    options, HQ, DV = draw.options(), inputs.q.shape[2], inputs.v.shape[-1]
    cu = [torch.tensor(end, dtype=torch.int32, device=draw.at) for end in ends]

    def part(x: Inputs, t: slice, s: slice) -> Inputs:
        slots = ([slot[:, t] for slot in each] for each in x[3:])
        return Inputs(x.q[:, t], x.k[:, s], x.v[:, s], *slots)

    def call(x: Inputs) -> tuple[Tensor, Tensor]:
        return moda_ops.moda_attention_varlen(*x[:3], *depth(x), *cu, **options, return_lse=True)

    dout, dlse = draw.cotangents(1, T, HQ, DV, lse_shape=(1, HQ, T), like=inputs.q)
    packed, poisoned = inputs.map(lambda x: x[0].clone()), draw.chance("poisoned", 0.5)
    padded_q, padded_k = slice(ends[0][-1], T), slice(ends[1][-1], S)
    if poisoned:
        for x in (packed.q, *packed.k_depth, *packed.v_depth):
            x[padded_q] = draw.poison
        packed.k[padded_k] = packed.v[padded_k] = draw.poison
        dout, dlse = dout.clone(), dlse.clone()
        dout[:, padded_q], dlse[..., padded_q] = 0, 0  # a loss that does not look at them
    out, lse, grads = run(draw, packed, call, dout[0], dlse[0])
    out, lse, grads = out[None], lse[None], grads.map(lambda x: x[None])
    documents = [[slice(*pair) for pair in itertools.pairwise(end)] for end in ends]
    documents = list(zip(*documents, strict=True))
    for g in (grads.k, grads.v):
        assert not g[:, padded_k].any(), "keys after the last document have a gradient"
    if not poisoned:
        documents.append((padded_q, slice(S, S)))  # these see their slots alone
    for t, s in documents:
        exact = known(options, t.stop - t.start, s.stop - s.start)
        results = out[:, t], lse[..., t], part(grads, t, s)
        if draw.drawn["ones"]:
            check_normalised(results[0], results[1], T + S)
        assert_matches_reference(
            part(inputs, t, s),
            lambda *_, results=results: results,
            (dout[:, t], dlse[..., t]),
            stored=True,
            **exact,
        )


def mass(draw: Draw) -> None:
    """Shares of depth and of the first keys, whatever lse they are taken of."""
    inputs, options = make(draw, draw.shape()), draw.options()
    (B, T, _, D), S = inputs.q.shape, inputs.k.shape[1]
    exact = known(options, T, S)
    _, lse = plain_attention(inputs.map(torch.Tensor.double), **exact)
    lse = lse.to(ops.lse_dtype(inputs.q)).masked_fill(lse.isinf(), float("-inf"))
    placed = inputs.map(draw.place)
    of_scores = {name: options[name] for name in ("scale", "softcap")}
    arrays, lse_array = inputs.numpy(), lse.double().cpu().numpy()
    finite = lse.masked_fill(lse.isinf(), 1e9)  # their probabilities are zero
    share = moda_ops.moda_depth_mass(placed.q, depth(placed)[0], lse, **of_scores)
    expected = moda_reference.depth_mass(arrays[0], arrays[3], lse_array, **of_scores)
    slots = depth(inputs)[0]
    slots = list(slots.unbind(2)) if isinstance(slots, Tensor) else slots
    if slots and T and B:
        assert_mass("depth mass", share, expected, inputs.q, slots, finite, **of_scores)
    keys = draw("sinks", 1, 2, 5)
    share = moda_ops.moda_sink_mass(placed.q, placed.k, lse, keys=keys, **options)
    expected = moda_reference.sink_mass(*arrays[:2], lse_array, keys=keys, **exact)
    n = min(keys, S)
    if n and T and B:  # as the mass of one slot, over tokens once for each key
        seen = moda_reference.visible(T, S, exact["causal"], exact["window"])
        hidden = ~torch.from_numpy(seen[:, :n].T.flatten()).to(draw.at)
        key = inputs.k[:, :n].repeat_interleave(T, 1)
        q, finite = inputs.q.repeat(1, n, 1, 1), finite.repeat(1, 1, n).masked_fill(hidden, 1e9)
        share, expected = share[..., None] / n, expected[..., None] / n
        assert_mass("sink mass", share, expected, q, [key], finite, **of_scores)


def decoding(draw: Draw) -> None:
    """Contiguous and paged caches; places that no query sees are NaN, their pages do not exist."""
    shape = draw.shape()
    B, N = shape.pop("B"), draw("N", 1, 1, 2, 3, 16)
    for name in ("T", "S"):
        del shape[name]
    options = draw.options("causal")
    append, page = draw.chance("append", 0.6), draw("page", None, None, 1, 5, 16, 64)
    longest = draw("longest", 0, 3, 40, 130 if draw.device != "cuda" else 3000)
    lengths = draw.drawn["lengths"] = [draw.random.randint(0, longest) for _ in range(B)]
    left = known(options, 2**30, 0)["window"]
    case = make_decoding(
        lengths, N, shape.pop("HQ"), shape.pop("H"), shape.pop("D"), shape.pop("L"),
        page_size=page, append=append, spare=draw("spare", 0, 3, 70),
        left=left[0] if isinstance(left, tuple) else left, **shape,
    )  # fmt: skip
    case = case._replace(
        k_cache=draw.place(case.k_cache, written=append),
        v_cache=draw.place(case.v_cache, written=append),
        k_new=None if case.k_new is None else draw.place(case.k_new),
        v_new=None if case.v_new is None else draw.place(case.v_new),
    )

    def call(case: Any) -> tuple[Tensor, Tensor]:
        x = case.inputs.map(draw.place)
        rest = dict(zip(("cache_seqlens", "block_table", "k_new", "v_new"), case[4:], strict=True))
        return moda_ops.moda_decode(
            x.q, case.k_cache, case.v_cache, *depth(x), **rest, **options, return_lse=True
        )

    assert_decodes(case, call, stored=True, **known(options, N, max(case.lengths, default=0)))


@dataclasses.dataclass(frozen=True)
class DenseStream:
    """A depth stream as anybody would write it, by ``plain_attention``."""

    slots: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def written(self) -> int:
        return len(self.slots)

    def write(self, k: Tensor, v: Tensor) -> "DenseStream":
        return DenseStream((*self.slots, (k, v)))

    def keep(self, slots: list[int]) -> "DenseStream":
        return DenseStream(tuple(self.slots[i] for i in slots))

    def attend(
        self, q: Tensor, k: Any = None, v: Any = None, *, cu_seqlens: Any = None, **options: Any
    ) -> tuple[Tensor, "DenseStream"]:
        slots = self.slots
        if k is None:
            *slots, (k, v) = slots
        x = Inputs(q, k, v, [k for k, _ in slots], [v for _, v in slots])
        if cu_seqlens is None:
            return plain_attention(x, **options)[0], self
        outs = []
        for t, s in zip(*(itertools.pairwise(cu.tolist()) for cu in cu_seqlens), strict=True):
            tokens = [[slot[:, slice(*t)] for slot in each] for each in x[3:]]
            of = Inputs(q[:, slice(*t)], k[:, slice(*s)], v[:, slice(*s)], *tokens)
            outs.append(plain_attention(of, **options)[0])
        return torch.cat(outs, 1), self

    def attend_depth(self, q: Tensor, **options: Any) -> tuple[Tensor, "DenseStream"]:
        _, (k, v) = 0, self.slots[0]
        return self.attend(q, k[:, :0], v[:, :0], causal=False, **options)


@dataclasses.dataclass
class Program:
    """What a model does with its stream, step by step; every kind of stream runs the same."""

    steps: list[tuple[str, dict[str, Any]]]
    weights: Tensor  # [steps, D]
    H: int
    DV: int

    def run(self, stream: Any, fresh: Callable[[], Any], x: Tensor, y: Tensor) -> Tensor:
        """All outputs in one; y is added to every value."""

        def parts(x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (torch.sin(x * w.to(x)) for w in self.weights[i])
            return q, k[:, :, : self.H], v[:, :, : self.H, : self.DV] + y

        def block(x: Tensor, stream: Any, i: int, options: dict[str, Any]) -> tuple[Tensor, Any]:
            q, k, v = parts(x, i)
            return stream.write(k, v).attend(q, **options)

        older, outs = [stream], []
        D = x.shape[-1]
        for i, (step, options) in enumerate(self.steps):
            out, (q, k, v) = None, parts(x, i)
            if step == "block":
                out, stream = block(x, stream, i, options)
            elif step == "checkpoint":
                out, stream = checkpoint(block, x, stream, i, options, use_reentrant=False)
            elif step == "no_grad":
                with torch.no_grad():
                    out, stream = block(x, stream, i, options)
            elif step == "write":
                stream = stream.write(k, v)
            elif step == "outside":
                out, stream = stream.attend(q, k, v, **options)
            elif step == "depth":
                out, stream = stream.attend_depth(q, **options)
            elif step == "aside":  # the stream goes on without this reader
                out, _ = stream.attend(q, k, v, **options)
            elif step == "older":  # a value from before is read once more
                out, _ = older[options["value"]].attend(q, k, v)
            elif step == "keep":
                stream = stream.keep(options["slots"])
            elif step == "read" and isinstance(stream, DepthStream):
                slots, stream = stream.read(), fresh()
                for slot in slots:
                    stream = stream.write(*slot.split([D, self.DV], -1))
            older.append(stream)
            if out is not None:
                outs.append(out)
                x = x + 0.5 * out.sum(-1, keepdim=True).tanh()
        return torch.cat([x.flatten(), *(out.flatten() for out in outs)])


def program(draw: Draw, T: int, B: int, D: int, H: int, DV: int) -> Program:
    """Steps that are allowed where they stand."""
    steps, written, dropped, newest = [], [0], False, False
    cu = None
    if B == 1 and T and draw.chance("documents", 0.25):
        cu = torch.tensor([0, T // 3, T // 3, T], dtype=torch.int32, device=draw.at)
    names = ("block", "block", "block", "checkpoint", "write", "outside", "depth", "aside", "older", "keep", "read")
    names += ("no_grad",) if draw.chance("no_grad", 0.15) else ()
    for _ in range(draw("steps", 2, 4, 7)):
        step, n = draw.random.choice(names), written[-1]
        options: dict[str, Any] = dict(scale=draw.random.choice((None, 0.4)), softcap=draw.random.choice((None, 2.0)))
        if step == "depth" and n == 0:
            step = "write"
        if step == "read" and dropped:
            step = "keep"
        if step in ("block", "checkpoint", "no_grad", "outside", "aside"):
            options["window"] = draw.random.choice((None, None, 0, 3))
            options["cu_seqlens"] = None if cu is None else (cu, cu)
        if step == "older":
            options = dict(value=draw.random.randrange(len(written)))
        if step == "keep":
            kept = sorted(draw.random.sample(range(n), draw.random.randint(0, n)))
            options = dict(slots=kept)
            dropped, n = dropped or len(kept) < n, len(kept)
        n += step in ("block", "checkpoint", "no_grad", "write")
        written.append(n)
        steps.append((step, options))
    shown = [step if step != "keep" else f"keep{options['slots']}" for step, options in steps]
    draw.drawn["program"] = "-".join(shown)
    generator = torch.Generator().manual_seed(draw.seed)
    weights = torch.randn(len(steps), 3, D, generator=generator)
    return Program(steps, weights, H, DV)


def make_stream(draw: Draw) -> tuple[Program, dict[str, Any], tuple[Tensor, Tensor], int]:
    """A program, what ``DepthStream.allocate`` takes for it, its inputs, and its slots."""
    d = draw.device
    B, T = draw("B", 1, 1, 2), draw("T", *(t for t in TOKENS[d] if 0 < t < 200))
    H, G = draw("H", 1, 2), draw("G", *GROUPS[d][:5], family=True)
    D, dtype = draw("D", *HEAD_DIMS[d], family=True), draw("dtype", *DTYPES[d], family=True)
    DV = draw("DV", D, max(1, D // 2), family=True)
    grad_dtype = draw("grad_dtype", None, torch.float32) if dtype.itemsize == 2 else None
    what = program(draw, T, B, D, H, DV)
    generator = torch.Generator().manual_seed(draw.seed)
    x, y = (torch.randn(s, generator=generator).to(draw.at, dtype) for s in ((B, T, G * H, D), (B, T, H, DV)))
    slots = len(what.steps) + draw("spare", 0, 2)
    sizes = dict(slots=slots, batch=B, tokens=T, kv_heads=H, head_dim=D, value_dim=DV)
    return what, sizes | dict(dtype=dtype, device=draw.at, grad_dtype=grad_dtype), (x, y), slots


def stream(draw: Draw) -> None:
    """DepthStream and DepthSlots against the dense model in float64, and in their own dtype."""
    what, allocation, inputs, _ = make_stream(draw)
    wanted = draw("gradients", (0, 1), (0,), (1,))
    again = draw.chance("again", 0.3)
    generator = torch.Generator().manual_seed(draw.seed + 1)

    def results(kind: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        new = (lambda: kind.allocate(**allocation)) if kind is DepthStream else kind
        x, y = leaves = [draw.place(x.to(dtype or x.dtype)).detach().requires_grad_() for x in inputs]
        out = what.run(new(), new, x, y)
        cotangent = torch.randn(out.shape, generator=generator.manual_seed(draw.seed + 1)).to(out)
        of = [leaves[i] for i in wanted]
        grads = torch.autograd.grad(out, of, cotangent, retain_graph=again, materialize_grads=True)
        if again:
            twice = torch.autograd.grad(out, of, cotangent, materialize_grads=True)
            assert all(map(torch.equal, grads, twice)), f"{kind.__name__}: a second backward differs"
        return [out.detach(), *grads]

    exact, plain = results(DenseStream, torch.float64), results(DenseStream)
    eps = torch.finfo(torch.promote_types(torch.float32, inputs[0].dtype)).eps
    eps = max(eps, torch.finfo(torch.float32).eps, torch.finfo(inputs[0].dtype).eps)
    for kind in (DepthSlots, DepthStream):
        try:
            actual = results(kind)
        except RuntimeError as error:
            if kind is DepthStream and "no_grad" in draw.drawn["program"] and "no_grad" in str(error):
                continue  # refused by name
            raise
        for name, a, e, p in zip(("out", *(f"d{'xy'[i]}" for i in wanted)), actual, exact, plain, strict=True):
            bound = 2 * (p - e).norm() + len(what.steps) * eps * e.norm()
            assert (a - e).norm() <= bound, (
                f"{kind.__name__} {name}: error {(a - e).norm():.2e}, allowed {bound:.2e} of {e.norm():.2e}"
            )


def _call(draw: Draw, name: str, **more: Any) -> Any:
    """A call of this operator from the tests' table, at a drawn shape."""
    shape = dict(G=draw("G", 1, 2, 3, family=True), H=2, D=draw("D", 8, 16, 33, family=True))
    shape |= dict(L=draw("L", 0, 1, 3), DV=draw("DV", 4, 16, family=True), device=draw.at)
    HQ = shape.pop("G") * shape["H"]
    dtype = torch.float32 if draw.device != "cpu" else torch.float64
    return lambda seed, **sizes: make_call(
        name, seed, HQ=HQ, dtype=dtype, form=draw.drawn["form"], **shape | more | sizes
    )


def compiled(draw: Draw) -> None:
    """A compiled operator, or a whole stream, beside itself run eagerly; twice if shapes change."""
    torch._dynamo.reset()
    backends = ("aot_eager", "aot_eager", "aot_eager", "inductor") if draw.device != "interpreter" else ("aot_eager",)
    backend, dynamic = draw("backend", *backends), draw("dynamic", None, True)
    name = draw("operator", *DIFFERENTIABLE, "decode", "stream", "stream")
    calls: list[tuple[Callable[..., Any], list[Any]]] = []
    if name == "stream":
        what, allocation, inputs, _ = make_stream(draw)
        allocate = lambda: DepthStream.allocate(**allocation)  # noqa: E731
        f = lambda x, y: (what.run(allocate(), allocate, x, y),)  # noqa: E731
        calls = [(f, list(inputs))]
    else:
        draw("form", "list", "packed")
        call = _call(draw, name)
        sizes = [{}] if name == "decode" else [{}, dict(T=11, S=13)]
        calls = [((c := call(0, **size)).run, c.leaves()) for size in sizes]
        f = calls[0][0]
    run_compiled = torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=name != "stream")
    for eager, leaves in calls:
        results = []
        for g in (eager, run_compiled):
            own = [x.clone().requires_grad_(x.is_floating_point() and name != "decode") for x in leaves]
            outs = g(*own)
            grads = [x for x in own if x.requires_grad]
            loss = sum(out.masked_fill(out.isinf(), 0).sin().sum() for out in outs)
            results.append([*outs, *(torch.autograd.grad(loss, grads, materialize_grads=True) if grads else ())])
        for a, b in zip(*results, strict=True):
            assert a.dtype is b.dtype and (name == "stream" or a.stride() == b.stride())
            eps = 64 * torch.finfo(a.dtype).eps if backend == "inductor" else 0.0
            torch.testing.assert_close(a, b, rtol=eps, atol=eps)


def vmap(draw: Draw) -> None:
    """An operator under torch.vmap beside a loop over the mapped dimension."""
    name = draw("operator", *DIFFERENTIABLE, *BACKWARD, "decode")
    draw("form", "list", "packed")
    patterns = (0,), (-1,), (None, 0, 1, -1), (0, None, None), (1, 0)
    pattern = draw("in_dims", *patterns)
    call = _call(draw, name)
    calls = [call(seed) for seed in range(SIZE)]
    dims, stacked = mapped_arguments(calls, pattern)
    f = calls[0].run
    actual, expected = torch.vmap(f, dims)(*stacked), loop(f, dims, stacked)
    for a, e in zip(actual, expected, strict=True):
        eps = 64 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, e, rtol=eps, atol=eps)


KINDS: dict[str, tuple[Callable[[Draw], None], int]] = dict(
    attention=(attention, 8),
    varlen=(varlen, 5),
    chunk_attention=(chunk_attention, 3),
    depth_attention=(depth_attention, 2),
    mass=(mass, 2),
    decode=(decoding, 5),
    stream=(stream, 5),
    compiled=(compiled, 1),
    vmap=(vmap, 2),
)
"""Each kind's function, and how often it comes."""


def cases(seed: int, kinds: list[str]) -> Iterator[tuple[str, int]]:
    """Endless kinds and integers; FAMILY successive cases of a kind are of one family."""
    choose, weights = random.Random(seed), [KINDS[kind][1] for kind in kinds]
    rounds: Counter[str] = Counter()
    families: dict[tuple[str, int], int] = {}
    while True:
        (kind,) = choose.choices(kinds, weights)
        family, member = divmod(rounds[kind], FAMILY)
        first = families.setdefault((kind, family), choose.randrange(2**24))
        rounds[kind] += 1
        yield kind, first * FAMILY + member


@contextlib.contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """The operators' implementation for this device; new memory is NaN."""
    implementations = ops.implementation, decode.implementation
    if device == "interpreter":
        import moda_kernels

        ops.implementation = decode.implementation = lambda q: moda_kernels
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ops.implementation, decode.implementation = implementations
        torch.use_deterministic_algorithms(deterministic)


def failure(kind: str, seed: int, device: str, verbose: bool = False) -> str | None:
    """Run a case; None, or the line that reports what is wrong with it."""
    draw = Draw(kind, seed, device)
    try:
        with kernels_of(device):
            KINDS[kind][0](draw)
            draw.check_memory()
            if device == "cuda":
                torch.cuda.synchronize()
    except Exception as error:
        if verbose:
            traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        drawn = ", ".join(f"{name}={value}" for name, value in draw.drawn.items())
        again = f"python tests/fuzz.py --device {device} --case {kind}:{seed}"
        return f"FAILED {again}  # {said}  ({drawn})"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--only", choices=KINDS, action="append", help="may be given several times")
    parser.add_argument("--case", help="KIND:INTEGER, with its traceback")
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    todo, end = cases(args.seed, args.only or list(KINDS)), time.monotonic() + args.seconds
    if args.case:
        kind, seed = args.case.split(":")
        todo, end = iter([(kind, int(seed))]), float("inf")
    done: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for kind, seed in todo:
        line = failure(kind, seed, args.device, verbose=bool(args.case))
        done[kind] += 1
        if line:
            failed[kind] += 1
            print(line, flush=True)
        if time.monotonic() > end:
            break
    for kind, count in sorted(done.items()):
        print(f"{kind:16} {count:6} cases, {failed[kind]} failed")
    print(f"{sum(done.values())} cases on {args.device}, {sum(failed.values())} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
