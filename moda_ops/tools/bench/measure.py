"""One row: is the contender right, and how long does it take.

Times are medians, in milliseconds, of inputs that take turns and together exceed the GPU's L2
cache. On a GPU each call is replayed as a CUDA graph, so that they are the device's alone.
"""

import gc
import statistics
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_ops.operators import eager
from moda_ops.tools.bench.contenders import Call, Case, Contender, Inputs

CHECKED = 32  # tokens at the end of each sequence whose results are compared with float64
Row = dict[str, Any]


class Check(NamedTuple):
    """Largest relative error of a result, in norm, and the largest share of its tolerance.

    The tolerance is twice the error of plain PyTorch (``operators.eager``) in the same dtype, plus
    one rounding to it.
    """

    error: float
    share: float


def check(contender: Contender, case: Case, dtype: torch.dtype, device: torch.device) -> Check:
    """Results of the last tokens, whose cotangents alone are not zero, against float64."""
    x = Inputs.random(case, dtype, device, seed=0)
    last = slice(max(case.T - CHECKED, 0), None)
    dout = torch.zeros_like(x.dout)
    dout[:, last] = x.dout[:, last]
    passes = contender.prepare(x._replace(dout=dout), case)
    actual = _named(contender, passes.forward(), passes.backward and passes.backward())

    def reference(dtype: torch.dtype) -> dict[str, Tensor]:
        q, dq = x.q[:, last].to(dtype), x.dout[:, last].to(dtype)
        k, v = (y.to(dtype) if contender.sequence else y[:, :0].to(dtype) for y in (x.k, x.v))
        depth = [[y[:, last].to(dtype)] if contender.depth else [] for y in (x.k_depth, x.v_depth)]
        options = case.D**-0.5, None, 0 if case.causal else None, None
        out, lse = eager.attention(q, k, v, *depth, *options)
        grads = eager.attention_backward(dq, None, q, k, v, *depth, out, lse, *options)
        taking_part = grads[: 3 if contender.sequence else 1]
        return _named(contender, out, [*taking_part, *grads[3], *grads[4]])

    exact, plain = reference(torch.float64), reference(dtype)

    def error(name: str, result: Tensor) -> float:
        if name not in ("dk", "dv"):
            result = result[:, -exact[name].shape[1] :]
        return ((result.double() - exact[name]).norm() / exact[name].norm()).item()

    errors = {name: error(name, result) for name, result in actual.items()}
    eps = torch.finfo(dtype).eps
    shares = [e / (2 * error(name, plain[name]) + eps) for name, e in errors.items()]
    worst = max(errors.values(), key=lambda e: (e != e, e))
    return Check(worst, max(shares, key=lambda s: (s != s, s)))


def _named(contender: Contender, out: Tensor, grads: Iterable[Tensor] | None) -> dict[str, Tensor]:
    """Results by their names, gradients of depth packed."""
    results = dict(out=out.flatten(2, -2))
    if grads is None:
        return results
    dq, *rest = grads
    results["dq"] = dq
    if contender.sequence:
        results["dk"], results["dv"], *rest = rest
    if contender.depth and rest[0].dim() == 4:
        half = len(rest) // 2
        rest = [torch.stack(rest[:half], 2), torch.stack(rest[half:], 2)]
    if contender.depth:
        results["dk_depth"], results["dv_depth"] = rest
    return results


def median_ms(calls: list[Call], device: torch.device, seconds: float) -> float:
    """Of a call, the calls taking turns for so many seconds, and for at least ten calls."""
    times: list[float] = []
    if device.type == "cpu":
        start = time.perf_counter()
        while len(times) < 10 or time.perf_counter() - start < seconds:
            begin = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)
    replays = [_captured(call) for call in calls]
    for replay in replays:
        replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    while len(times) < 10 or time.perf_counter() - start < seconds:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        events[0].record()
        for i, event in enumerate(events[1:], len(times)):
            replays[i % len(replays)]()
            event.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in pairwise(events)]
    return statistics.median(times)


def _captured(call: Call) -> Call:
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():  # which cannot be captured
        stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles, and builds what a library builds on a first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes per millisecond, read and written, of a large copy on the device."""
    size = 2**28 if device.type == "cuda" else 2**24
    a, b = torch.randint(127, (2, size), dtype=torch.int8, device=device).unbind()
    return 2 * size / median_ms([lambda: b.copy_(a)], device, seconds)


def measure(
    contender: Contender, case: Case, dtype: torch.dtype, device: torch.device, seconds: float
) -> Row:
    """One row: both times if the results are right, else a status that says what was wrong."""
    row: Row = dict(
        contender=contender.name,
        sequence=contender.sequence,
        depth=contender.depth,
        **case._asdict(),
    )
    # One stream for all of it: autograd runs a backward on the stream of its forward, and that one
    # has to be captured.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    try:
        with torch.cuda.stream(stream):
            checked = check(contender, case, dtype, device)
            row |= checked._asdict()
            if not checked.share <= 1:
                return row | dict(status=f"wrong: error {checked.error:.1e}")
            release(device)
            cache = torch.cuda.get_device_properties(device).L2_cache_size if stream else 0
            inputs = [Inputs.random(case, dtype, device, seed=0)]
            while sum(x.nbytes for x in inputs) <= 2 * cache:
                inputs.append(Inputs.random(case, dtype, device, seed=len(inputs)))
            prepared = [contender.prepare(x, case) for x in inputs]
            row["forward_ms"] = median_ms([p.forward for p in prepared], device, seconds)
            if backwards := [p.backward for p in prepared if p.backward]:
                row["backward_ms"] = median_ms(backwards, device, seconds)
    except torch.OutOfMemoryError:
        row["status"] = "out of memory"
    except Exception as error:  # a peer that fails must not end the run
        row["status"] = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"
    return row


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
