"""Random calls of every operator against the NumPy reference or a dense float64 model.

    python tests/fuzz.py --seconds 60 --seed 1 --device cpu
    python tests/fuzz.py --device cpu --case attention:1234567

A case is a kind and an integer, which seed the generators that all its choices are drawn from.
"cuda" runs the compiled kernels, "cpu" the eager implementation, and "interpreter" the kernels on
CPU tensors. A failure is one line that says how to run the case again; it does not stop the run.
"""

import argparse
import contextlib
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

import moda_ops
import moda_reference
from fuzz_draw import FAMILY, SIZES, Draw, depth
from fuzz_stream import Program, stream
from helpers import Inputs, assert_accurate, assert_decodes, assert_matches_reference, make_decoding
from moda_ops.operators import definition as ops
from moda_ops.operators.checks import sum_dtype
from operators import BACKWARD, DIFFERENTIABLE, Call, make_call
from test_batching import SIZE, loop, mapped_arguments
from test_depth_mass import assert_mass


def check(draw: Draw, inputs: Inputs, call: Callable[..., Any], options: dict[str, Any]) -> None:
    """One batched call, forward and backward; keys that no query sees are poisoned for it."""
    T, S = inputs.q.shape[1], inputs.k.shape[1]
    given = inputs
    if draw.chance("unseen poisoned", 0.5):
        seen = moda_reference.visible(T, S, options.get("causal", True), options.get("window"))
        hidden = ~torch.from_numpy(seen.any(0)).to(draw.at)[:, None, None]
        k, v = (x.masked_fill(hidden, draw.poison) for x in (inputs.k, inputs.v))
        given = inputs._replace(k=k, v=v)
    cotangents = draw.cotangents(inputs)
    results = draw.run(given, call, *cotangents)
    check_normalised(draw, *results[:2], S + T * draw.drawn["L"])
    assert_matches_reference(inputs, lambda *_: results, cotangents, stored=True, **options)


def check_normalised(draw: Draw, out: Tensor, lse: Tensor, keys: int) -> None:
    """Values of one give one, however large the logits: only sums and what is stored is rounded."""
    if draw.drawn["ones"]:
        errors = (out.double() - 1).abs()[lse.transpose(1, 2).isfinite()]
        allowed = keys * torch.finfo(torch.float32).eps + 2 * torch.finfo(out.dtype).eps
        error = errors.max().item() if errors.numel() else 0.0
        assert error <= allowed, f"probabilities sum to 1 +- {error:.2e}, allowed {allowed:.2e}"


def attention(draw: Draw) -> None:
    inputs = draw.inputs(draw.shape())
    options = draw.options("causal", "window", "scale", "softcap")
    plan = draw("plan", "auto", "fused", "split")

    def call(x: Inputs) -> Any:
        more = dict(options, return_lse=True)
        try:
            return moda_ops.moda_attention(*x[:3], *depth(x), **more, plan=plan)
        except ValueError as error:
            if plan != "split" or "plan" not in str(error):  # what no library covers is refused
                raise
            return moda_ops.moda_attention(*x[:3], *depth(x), **more)

    check(draw, inputs, call, options)


def chunk_attention(draw: Draw) -> None:
    shape = draw.shape()
    pairs = shape["B"] * shape["HQ"] * shape["T"] ** 2  # times L: the reference's scores
    shape["L"] = draw.drawn["L"] = min(shape["L"], 4_000_000 // max(1, pairs))
    inputs = draw.inputs(shape)
    options = draw.options("window", "scale", "softcap")
    options["chunk_size"] = draw("chunk", 1, 2, 3, 7, 16, 1000)

    def call(x: Inputs) -> Any:
        return moda_ops.moda_chunk_attention(*x[:3], *depth(x), **options, return_lse=True)

    check(draw, inputs, call, options)


def depth_attention(draw: Draw) -> None:
    slots = draw.random.choice(SIZES[draw.device]["L"][1:])
    inputs, options = draw.inputs(draw.shape(S=0, L=slots)), draw.options("scale", "softcap")

    def call(x: Inputs) -> Any:
        return moda_ops.moda_depth_attention(x.q, *depth(x), **options, return_lse=True)

    check(draw, inputs, call, options)


def varlen(draw: Draw) -> None:
    """Documents of all lengths, and an end that may be padded with poison."""
    count = draw("documents", 0, 1, 2, 3, 5)
    lengths = [[draw.size("document") for _ in range(count)] for _ in "qk"]
    if draw.chance("self", 0.4):
        lengths[1] = lengths[0]
    draw.drawn["document"] = lengths
    ends = [[0, *itertools.accumulate(each)] for each in lengths]
    pads = draw("padding", (0, 0), (3, 0), (0, 4), (20, 20), (1, 2))
    T, S = (end[-1] + pad for end, pad in zip(ends, pads, strict=True))
    padded_q, padded_k = slice(ends[0][-1], T), slice(ends[1][-1], S)
    inputs = draw.inputs(draw.shape(B=1, T=T, S=S))
    options = draw.options("causal", "window", "scale", "softcap")
    cu = [torch.tensor(end, dtype=torch.int32, device=draw.at) for end in ends]

    def call(x: Inputs) -> Any:
        return moda_ops.moda_attention_varlen(*x[:3], *depth(x), *cu, **options, return_lse=True)

    def part(x: Inputs, t: slice, s: slice) -> Inputs:
        slots = ([slot[:, t] for slot in each] for each in x[3:])
        return Inputs(x.q[:, t], x.k[:, s], x.v[:, s], *slots)

    dout, dlse = draw.cotangents(inputs)
    pack, poisoned = inputs.map(lambda x: x[0].clone()), draw.chance("padding poisoned", 0.5)
    if poisoned:
        for x in (pack.q, *pack.k_depth, *pack.v_depth):
            x[padded_q] = draw.poison
        pack.k[padded_k] = pack.v[padded_k] = draw.poison
        dout, dlse = dout.clone(), dlse.clone()
        dout[:, padded_q], dlse[..., padded_q] = 0, 0  # of a loss that does not look at them
    out, lse, grads = draw.run(pack, call, dout[0], dlse[0])
    out, lse, grads = out[None], lse[None], grads.map(lambda x: x[None])
    documents = list(zip(*([slice(*x) for x in itertools.pairwise(e)] for e in ends), strict=True))
    if not poisoned:
        documents.append((padded_q, slice(S, S)))  # these rows see their slots alone
    for t, s in documents:
        results = out[:, t], lse[..., t], part(grads, t, s)
        check_normalised(draw, *results[:2], T + S)
        assert_matches_reference(
            part(inputs, t, s),
            lambda *_, results=results: results,
            (dout[:, t], dlse[..., t]),
            stored=True,
            **options,
        )
    for name, grad in (("dk", grads.k), ("dv", grads.v)):
        largest = grad[:, padded_k].abs().max().item() if pads[1] else 0.0
        assert largest == 0, f"{name} after the last document is {largest}, must be 0"


def mass(draw: Draw) -> None:
    """What depth and the first keys received, of a plain evaluation's lse."""
    inputs, options = (
        draw.inputs(draw.shape()),
        draw.options("causal", "window", "scale", "softcap"),
    )
    (B, T, _, _), S = inputs.q.shape, inputs.k.shape[1]
    of_scores = dict(scale=options["scale"], softcap=options["softcap"])
    arrays = inputs.numpy()
    lse = torch.from_numpy(moda_reference.attention(*arrays, **options)[1])
    lse = lse.to(draw.at, sum_dtype(inputs.q))
    lse_array, finite = lse.double().cpu().numpy(), lse.masked_fill(lse.isinf(), 1e9)
    placed, keys = inputs.map(draw.place), draw("keys", 1, 2, 5)
    depth_mass = moda_ops.moda_depth_mass(placed.q, depth(placed)[0], lse, **of_scores)
    sink_mass = moda_ops.moda_sink_mass(placed.q, placed.k, lse, keys=keys, **options)
    if B * T == 0:
        return
    slots = depth(inputs)[0]
    slots = list(slots.unbind(2)) if isinstance(slots, Tensor) else slots
    if slots:
        expected = moda_reference.depth_mass(arrays[0], arrays[3], lse_array, **of_scores)
        assert_mass("depth mass", depth_mass, expected, inputs.q, slots, finite, **of_scores)
    n = min(keys, S)
    if n:  # as the mass of one slot, over the tokens once for each key
        expected = moda_reference.sink_mass(*arrays[:2], lse_array, keys=keys, **options)
        seen = moda_reference.visible(T, S, options["causal"], options["window"])[:, :n]
        finite = finite.repeat(1, 1, n)
        finite.masked_fill_(~torch.from_numpy(seen.T.flatten()).to(draw.at), 1e9)
        q, slot = inputs.q.repeat(1, n, 1, 1), inputs.k[:, :n].repeat_interleave(T, 1)
        shares = sink_mass[..., None] / n, expected[..., None] / n
        assert_mass("sink mass", *shares, q, [slot], finite, **of_scores)


def decoding(draw: Draw) -> None:
    """Contiguous and paged caches; places that no query sees are NaN, their pages do not exist."""
    shape, options = draw.shape(), draw.options("window", "scale", "softcap")
    N, append = draw("N", 1, 1, 2, 3, 16), draw.chance("append", 0.6)
    longest = draw.size("cached")
    lengths = [draw.random.randint(0, longest) for _ in range(shape["B"])]
    draw.drawn["cached"] = lengths
    window = options["window"]
    left = window[0] if isinstance(window, tuple) else window
    sizes = [shape.pop(name) for name in ("HQ", "H", "D", "L")]
    more = {name: shape[name] for name in ("DV", "dtype", "device", "form", "seed")}
    more |= dict(page_size=draw("page", None, None, 1, 5, 16, 64), spare=draw("spare", 0, 3, 70))
    case = make_decoding(lengths, N, *sizes, append=append, left=left, **more)
    new = [x if x is None else draw.place(x) for x in (case.k_new, case.v_new)]
    caches = [draw.place(x, written=append) for x in (case.k_cache, case.v_cache)]
    case = case._replace(k_cache=caches[0], v_cache=caches[1], k_new=new[0], v_new=new[1])

    def call(case: Any) -> Any:
        x = case.inputs.map(draw.place)
        rest = dict(zip(("block_table", "k_new", "v_new"), case[5:], strict=True))
        arguments = x.q, case.k_cache, case.v_cache, *depth(x), case.cache_seqlens
        return moda_ops.moda_decode(*arguments, **rest, **options, return_lse=True)

    assert_decodes(case, call, stored=True, **options)


def calls_of(draw: Draw, name: str) -> Callable[..., Call]:
    """Calls of this operator from the tests' table, at a drawn shape."""
    (D, DV), H, G = draw.head_dims(), draw.size("H"), draw.size("G")
    least = int(name == "attention_varlen_backward")  # its documents and lse may not fit: no -inf
    shape = dict(H=H, HQ=G * H, D=D, DV=DV, L=draw("L", least, 1, 3))
    shape |= dict(form=draw("form", "list", "packed"))
    dtypes = dict(cpu=torch.float64, interpreter=torch.float32)
    shape |= dict(device=draw.at, dtype=dtypes.get(draw.device) or draw.size("dtype"))
    return lambda seed, **sizes: make_call(name, seed, **shape | sizes)


def compiled(draw: Draw) -> None:
    """A compiled operator or stream beside its eager run, an operator also at another length."""
    inductor = draw.device != "interpreter" and draw.chance("inductor", 0.1)
    name = draw("operator", *DIFFERENTIABLE, "decode", "stream", "stream")
    if name == "stream":
        program = Program(draw, refused=False)
        runs = [(lambda x, y: (program.run(program.allocate, x, y),), program.inputs)]
    else:
        make = calls_of(draw, name)
        calls = [make(0), *([] if name == "decode" else [make(0, T=11, S=13)])]
        runs = [(call.run, call.leaves()) for call in calls]
    torch._dynamo.reset()
    backend, dynamic = "inductor" if inductor else "aot_eager", draw("dynamic", None, True)
    run_compiled = torch.compile(runs[0][0], backend=backend, dynamic=dynamic)
    roundings = 64 if inductor or name == "stream" else 0
    for eager, leaves in runs:
        results = []
        for f in (eager, run_compiled):
            leaves = [x.detach().clone() for x in leaves]
            trained = [x for x in leaves if x.is_floating_point() and name != "decode"]
            outs = f(*(x.requires_grad_() if any(x is y for y in trained) else x for x in leaves))
            loss = sum(out.masked_fill(out.isinf(), 0).sin().sum() for out in outs)
            grads = torch.autograd.grad(loss, trained, materialize_grads=True) if trained else ()
            results.append([*(out.detach() for out in outs), *grads])
        for expected, actual in zip(*results, strict=True):
            check_close(actual, expected, roundings)


def check_close(actual: Tensor, expected: Tensor, roundings: int) -> None:
    """The same sums, perhaps in another order."""
    assert actual.dtype is expected.dtype
    finite = expected.masked_fill(expected.isinf(), 0.0)
    largest = finite.abs().max().item() if finite.numel() else 0.0
    dtype = torch.float32 if expected.dtype is torch.float64 else expected.dtype  # lse's sums
    floor = roundings * torch.finfo(dtype).eps * largest
    assert_accurate("result", actual, expected.double().cpu(), expected, floor)


def vmap(draw: Draw) -> None:
    """An operator under torch.vmap beside a loop over the mapped dimension."""
    make = calls_of(draw, draw("operator", *DIFFERENTIABLE, *BACKWARD, "decode"))
    calls = [make(seed) for seed in range(SIZE)]
    pattern = draw("in_dims", (0,), (-1,), (0, 1, -1, None), (0, None, None), (1, 0))
    dims, stacked = mapped_arguments(calls, pattern)
    f = calls[0].run
    actual, expected = torch.vmap(f, dims)(*stacked), loop(f, dims, stacked)
    for a, e in zip(actual, expected, strict=True):
        check_close(a, e, roundings=8 if e.itemsize == 2 else 64)


KINDS: dict[str, tuple[Callable[[Draw], None], float]] = dict(
    attention=(attention, 8),
    varlen=(varlen, 5),
    chunk_attention=(chunk_attention, 3),
    depth_attention=(depth_attention, 2),
    mass=(mass, 2),
    decode=(decoding, 5),
    stream=(stream, 5),
    compiled=(compiled, 0.1),
    vmap=(vmap, 2),
)
"""Each kind's function, and how often it comes."""


def cases(seed: int, kinds: list[str]) -> Iterator[tuple[str, int]]:
    """Kinds and integers without end, family by family."""
    source, weights = random.Random(seed), [KINDS[kind][1] for kind in kinds]
    while True:
        first = FAMILY * source.randrange(2**20)
        for case in range(first, first + FAMILY):
            yield source.choices(kinds, weights)[0], case


@contextlib.contextmanager
def operators_on(device: str, deterministic: bool = True) -> Iterator[None]:
    """The kernels for "interpreter"; with ``deterministic``, new memory is NaN."""
    before = ops.implementation
    mode = torch.are_deterministic_algorithms_enabled()
    if device == "interpreter":
        import moda_kernels

        ops.implementation = lambda q: moda_kernels
    torch.use_deterministic_algorithms(deterministic)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ops.implementation = before
        torch.use_deterministic_algorithms(mode)


def failure(kind: str, seed: int, device: str, *, verbose: bool = False) -> str | None:
    """Run one case; None, or the line that says what is wrong and how to run it again."""
    draw = Draw(kind, seed, device)
    try:
        with operators_on(device, draw.deterministic):
            KINDS[kind][0](draw)
            draw.check_memory()
    except Exception as error:
        if verbose:
            traceback.print_exc()
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        drawn = ", ".join(f"{name}={value}" for name, value in draw.drawn.items())
        command = f"python tests/fuzz.py --device {device} --case {kind}:{seed}"
        return f"{command}  # {said}  ({drawn})"
    return None


def gpu_answers() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--only", choices=KINDS, action="append", help="may be repeated")
    parser.add_argument("--case", metavar="KIND:INTEGER", help="this case alone, with traceback")
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if args.device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    todo, end = cases(args.seed, args.only or list(KINDS)), time.monotonic() + args.seconds
    if args.case:
        kind, seed = args.case.split(":")
        todo = iter([(kind, int(seed))])
    done, failed = Counter[str](), Counter[str]()
    for kind, seed in todo:
        line = failure(kind, seed, args.device, verbose=bool(args.case))
        done[kind] += 1
        if line:
            failed[kind] += 1
            print(line, flush=True)
            if args.device == "cuda" and not gpu_answers():
                print("the GPU no longer answers: the run ends here")
                break
        if time.monotonic() > end:
            break
    for kind, count in sorted(done.items()):
        print(f"{kind:16}{count:7} cases, {failed[kind]} failed")
    print(f"{'all':16}{done.total():7} cases, {failed.total()} failed, on {args.device}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
