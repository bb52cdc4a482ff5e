"""Packed documents, windows, decoding and chunks, each beside what it should cost.

    python tests/benchmarks/family.py [--json FILE] [--only varlen window decode chunk]

varlen   documents of equal lengths beside the same as a batch of the dense operator: time per token
         as a ratio. A skewed mix of lengths beside the sum of its documents' own times.
window   forward and backward by the window's width, beside no window.
decode   one new token per sequence, beside the time to read the cache once at the rate of a large
         copy; of at least eight such calls in one graph, as the layers of a model.
chunk    depth shared within chunks, by their size, beside the dense operator at the same shape.
         tile_tokens is how many tokens a tile of the forward has, tile_keys how many keys of the
         sequence it visits on average, and tile_depth how many depth keys: those of its own tokens
         and of the earlier ones in the first one's chunk. All are multiplied with all of the tile's
         rows, so that the forward should grow as tile_keys + tile_depth; but at size 1, as in the
         dense operator, depth keys are multiplied with their own token's rows alone.

Every row is compared with float64 (of the last rows and keys where that is large; of chunks, with
all gradients) before it is timed. Times are medians in milliseconds, on a GPU of CUDA graphs, of
inputs that exceed its L2 cache. On a CPU the sizes are tiny and the times mean nothing.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from moda_ops import moda_decode  # noqa: E402
from moda_ops.operators import eager  # noqa: E402
from moda_ops.tools.bench.measure import copy_rate, median_ms  # noqa: E402
from moda_ops.tools.bench.report import machine  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16
D, H, G, L = (64, 8, 2, 47) if CUDA else (16, 2, 2, 3)
CHECKED = 32  # tokens at the end of each sequence that are compared with float64
WORST = 2e-2  # error in norm; bfloat16's own is 2e-3 to 4e-3
SECONDS = 0.1 if CUDA else 0.001
PASSES = "forward", "backward"
Row = dict[str, Any]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def inputs(tokens: int, *batch: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """q, k, v, and packed depth in the operators' form."""
    q, k, v = (randn(*batch, tokens, heads, D) for heads in (G * H, H, H))
    return [q, k, v], [[randn(*batch, tokens, L, H, D)] for _ in range(2)]


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *depth: Tensor, left: int | None) -> float:
    """Error of the last tokens of one causal sequence, all (1, T, ..), against float64."""
    last = slice(-min(CHECKED, out.shape[1]), None)
    q, k, v, k_depth, v_depth = (
        x.double() for x in (q[:, last], k, v, *(x[:, last] for x in depth))
    )
    exact, _ = eager.attention(q, k, v, [k_depth], [v_depth], D**-0.5, left, 0, None)
    error = ((out[:, last].double() - exact).norm() / exact.norm()).item()
    if not error < WORST:
        raise AssertionError(f"error {error:.1e}")
    return error


def passes(name: str, x: list[Any], out: Tensor, lse: Tensor, **options: Any) -> dict[str, float]:
    """Milliseconds of an operator and of its backward."""
    forward = partial(getattr(torch.ops.moda, name), *x, **options)
    # The operator, not autograd: that runs on the stream of its forward, which is not captured.
    operator = getattr(torch.ops.moda, f"{name}_backward")
    backward = partial(operator, torch.randn_like(out), None, *x, out, lse, **options)
    return dict(
        forward=median_ms([forward], DEVICE, SECONDS),
        backward=median_ms([backward], DEVICE, SECONDS),
    )


def starts(lengths: list[int]) -> Tensor:
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)


def packed(lengths: list[int]) -> Row:
    """Both passes over documents of these lengths, and the largest error of one."""
    sequence, depth = inputs(sum(lengths))
    cu_seqlens, errors = starts(lengths), []
    x = [*sequence, *depth, cu_seqlens, cu_seqlens]
    out, lse = torch.ops.moda.attention_varlen(*x)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        document = (y[None, begin:end] for y in (out, *sequence, *(y for (y,) in depth)))
        errors.append(check(*document, left=None))
    return passes("attention_varlen", x, out, lse) | dict(error=max(errors))


def dense(batch: int, tokens: int, window: int | None = None) -> Row:
    sequence, depth = inputs(tokens, batch)
    x, options = [*sequence, *depth], dict(window_left=window, plan="fused")
    out, lse = torch.ops.moda.attention(*x, **options)
    error = check(*(y[:1] for y in (out, *sequence, *(y for (y,) in depth))), left=window)
    return passes("attention", x, out, lse, **options) | dict(error=error)


def varlen() -> list[Row]:
    rows = []
    for batch, tokens in ((8, 2048), (32, 512), (4, 8192)) if CUDA else ((2, 16),):
        row, beside = packed([tokens] * batch), dense(batch, tokens)
        rows.append(dict(documents=f"{batch} x {tokens}") | row | ratios(row, beside))
    skewed = [8192, *[2048] * 2, *[512] * 4, *[64] * 32] if CUDA else [12, 3, 1]
    row, alone = packed(skewed), {length: dense(1, length) for length in set(skewed)}
    parts = {name: sum(alone[length][name] for length in skewed) for name in PASSES}
    return [*rows, dict(documents="skewed, beside each alone") | row | ratios(row, parts)]


def ratios(row: Row, beside: Row) -> Row:
    return {f"{name}_ratio": row[name] / beside[name] for name in PASSES}


def window() -> list[Row]:
    tokens, widths = (16384, (128, 512, 2048, 8192, None)) if CUDA else (64, (4, 16, None))
    return [dict(tokens=tokens, window=width) | dense(1, tokens, width) for width in widths]


def check_chunks(x: list[Any], out: Tensor, lse: Tensor, size: int) -> float:
    """Largest error of a result, both passes, of the chunks of the last tokens, all (1, T, ..)."""
    first = max(out.shape[1] - CHECKED, 0) // size * size  # a chunk's first token
    dout = torch.zeros_like(out)
    dout[:, first:] = randn(*out[:, first:].shape)
    grads = torch.ops.moda.chunk_attention_backward(dout, None, *x, out, lse, chunk_size=size)

    q, k, v, (k_depth,), (v_depth,) = x
    q, dout, k_depth, v_depth = (y[:, first:].double() for y in (q, dout, k_depth, v_depth))
    inputs64 = q, k.double(), v.double(), [k_depth], [v_depth]
    options = size, D**-0.5, None, None
    exact_out, exact_lse = eager.chunk_attention(*inputs64, *options)
    exact = eager.chunk_attention_backward(dout, None, *inputs64, exact_out, exact_lse, *options)

    dq, dk, dv, (dk_depth,), (dv_depth,) = grads
    results = [out[:, first:], dq[:, first:], dk, dv, dk_depth[:, first:], dv_depth[:, first:]]
    expected = [exact_out, *exact[:3], *exact[3], *exact[4]]
    errors = [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)
    ]
    if not all(error < WORST for error in errors):
        raise AssertionError(f"chunk size {size}: errors {errors}")
    return max(errors)


def forward_tile(tokens: int, size: int) -> dict[str, int | float]:
    """What a tile of the forward visits, on average over tiles."""
    from moda_kernels import tuning

    tile = tuning.forward_tile(DEVICE, DTYPE, G, D, D, packed=True).BLOCK_M // G
    firsts = range(0, tokens, tile)
    ends = [min(first + tile, tokens) for first in firsts]
    seen = [end - first // size * size for first, end in zip(firsts, ends, strict=True)]
    mean = statistics.fmean
    return dict(tile_tokens=tile, tile_keys=mean(ends), tile_depth=mean(seen) * L)


def chunk() -> list[Row]:
    tokens, rows = 4096 if CUDA else 64, []
    beside = dense(1, tokens)
    for size in (1, 4, 16, 64):
        sequence, depth = inputs(tokens, 1)
        x, options = [*sequence, *depth], dict(chunk_size=size)
        out, lse = torch.ops.moda.chunk_attention(*x, **options)
        error = check_chunks(x, out, lse, size)
        row = passes("chunk_attention", x, out, lse, **options) | dict(error=error)
        row |= ratios(row, beside) | forward_tile(tokens, size)
        rows.append(dict(tokens=tokens, chunk_size=size) | row)
    return rows


def decoding(batch: int, length: int, *, paged: bool) -> tuple[Callable[[], Any], int, float]:
    """A step that makes contexts ``length`` long, the bytes that it must read, and its error."""
    (q, k_new, v_new), depth = inputs(1, batch)
    caches = [randn(batch, length, H, D) for _ in range(2)]
    seqlens = torch.full((batch,), length - 1, dtype=torch.int32, device=DEVICE)
    options: dict[str, Any] = dict(k_new=k_new, v_new=v_new)
    given = caches
    if paged:
        given = [y.view(-1, 64 if CUDA else 4, H, D) for y in caches]
        pages = torch.arange(len(given[0]), dtype=torch.int32, device=DEVICE)
        options["block_table"] = pages.view(batch, -1)
    packed_depth = [y for (y,) in depth]
    step = partial(moda_decode, q, *given, *packed_depth, seqlens, **options)
    error = check(*(y[:1] for y in (step(), q, *caches, *packed_depth)), left=None)
    return step, sum(y.nbytes for y in (*caches, *packed_depth)), error


def decode() -> list[Row]:
    rate = copy_rate(DEVICE, SECONDS)
    lengths = (4096, 16384, 65536, 131072) if CUDA else (8, 32)
    rows = []
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if CUDA else 0
    for batch, length, paged in itertools.product((1, 64) if CUDA else (1, 2), lengths, (0, 1)):
        if batch * length > 2**21:
            continue
        steps = [decoding(batch, length, paged=bool(paged))]
        while len(steps) * steps[0][1] <= 2 * cache:
            steps.append(decoding(batch, length, paged=bool(paged)))
        layers = [step for step, *_ in steps] * -(-8 // len(steps))
        ms = median_ms([lambda: [layer() for layer in layers]], DEVICE, SECONDS) / len(layers)  # noqa: B023
        floor = steps[0][1] / rate
        row = dict(batch=batch, context=length, paged=bool(paged), ms=ms, read_ms=floor)
        rows.append(row | dict(ratio=ms / floor, error=steps[0][2]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sections = dict(varlen=varlen, window=window, decode=decode, chunk=chunk)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=list(sections), default=list(sections))
    arguments = parser.parse_args()
    record: Row = machine(DEVICE) | dict(sizes=dict(D=D, H=H, G=G, L=L), dtype="bfloat16")
    print(", ".join(f"{name} {value}" for name, value in record.items()))
    for name in arguments.only:
        record[name] = sections[name]()
        print(f"\n{name}")
        for row in record[name]:
            cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print("  " + ", ".join(cells), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
