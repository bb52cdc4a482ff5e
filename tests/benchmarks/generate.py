"""Tokens per second of generation, with the depth stream and without.

    python tests/benchmarks/generate.py [--json FILE]      (made for a CUDA GPU; tiny on a CPU)

The model is MoDA with depth "kv+ffn", and beside it the same with depth "residual"; bfloat16 on a
GPU. Prompts of one length, then greedy tokens; eager, and with the decoding step compiled (on a GPU
a CUDA graph). Prefill is the time of one new token; a step is the time of the others divided by
their number. Times are medians, after a first call that compiles.

First each model is checked in float32, eager, and compiled if that is timed: every token must be
the full forward's choice at its place, or as probable as that up to rounding. With random weights
that says little, for most texts repeat a token; so the keys and values of every layer that steps
have left must be those of the whole text in one go.

Compiling 24 layers takes the host up to a minute for each dtype, depth and batch, and the rest
seconds. So checks and rows are processes, of which several (--jobs) get ready at the same time:
what is checked is checked, what is compiled is compiled. When all are, each row is timed while the
other processes wait. "first s" is the first call's time, beside the others'.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from moda_ops.nn import KVCache, MoDAConfig, MoDALanguageModel, generate, prefill  # noqa: E402
from moda_ops.tools.bench.report import machine  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES: dict[str, int] = (
    dict(layers=24, width=1024, heads=16, kv_heads=8, head_dim=64, hidden=4096, vocab_size=32_000)
    if CUDA
    else dict(layers=3, width=64, heads=4, kv_heads=2, head_dim=16, hidden=128, vocab_size=97)
)
DEPTHS = ("residual", "kv+ffn")  # the first is what the others are compared with
MODES = ("eager", "compiled")
ROUNDING = 1e-4  # of float32, through all layers: about 1e-6
COLUMNS = {  # name in a row: heading and format of the table
    "depth": ("depth", ""),
    "batch": ("batch", ""),
    "prompt": ("prompt", ""),
    "compile": ("compile", ""),
    "prefill_ms": ("prefill ms", ".2f"),
    "prefill_ratio": ("x residual", ".3f"),
    "step_ms": ("step ms", ".3f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "step_ratio": ("x residual", ".3f"),
    "peak_gb": ("peak GB", ".2f"),
    "first_call_s": ("first s", ".1f"),
}
Row = dict[str, Any]


class Task:
    """``function(ready, *arguments)`` in a process of its own, which stops at ``ready()``."""

    def __init__(self, function: Callable[..., Row], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, function, arguments))
        self.process.start()
        other.close()  # so that the pipe ends when the process does

    def receive(self, deadline: float) -> Row:
        """What it sends next: first that it is ready, at last its result."""
        if not self.pipe.poll(max(deadline - time.perf_counter(), 0)):
            raise TimeoutError
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit("a process has failed, see above") from None

    def go_on(self) -> None:
        self.pipe.send(None)

    def end(self) -> None:
        self.process.terminate()
        self.process.join()


def serve(pipe: Connection, function: Callable[..., Row], arguments: tuple[Any, ...]) -> None:
    def ready() -> None:
        pipe.send({})
        pipe.recv()

    pipe.send(function(ready, *arguments))


def results(tasks: list[tuple[Any, ...]], jobs: int, deadline: float) -> Iterator[Row]:
    """Of each task, so many of which get ready at the same time; TimeoutError at the deadline."""
    for start in range(0, len(tasks), jobs):
        if time.perf_counter() > deadline:
            raise TimeoutError
        started = [Task(*task) for task in tasks[start : start + jobs]]
        try:
            for task in started:
                task.receive(deadline)
            for task in started:
                task.go_on()
                result = task.receive(deadline)
                task.process.join()  # its end keeps a core busy for a second
                yield result
        finally:
            for task in started:
                task.end()


def make_model(config: MoDAConfig, dtype: torch.dtype) -> MoDALanguageModel:
    torch.manual_seed(0)
    with DEVICE:
        model = MoDALanguageModel(config)
    with torch.no_grad():
        model.embedding.weight *= 20  # logits that are not all alike, as after training
    return model.to(dtype)


def make_prompts(batch: int, length: int, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (batch, length), generator=generator).to(DEVICE)


@torch.no_grad()
def check(
    ready: Callable[[], None], config: MoDAConfig, prompt: int, new_tokens: int, modes: list[str]
) -> Row:
    """Generated texts against each whole text in one go, float32."""
    model = make_model(config, torch.float32)
    longest = make_prompts(2, prompt, config.vocab_size)
    prompts = [longest[0], longest[1, : prompt // 2]]

    def empty_cache(batch: int) -> KVCache:
        options = dict(dtype=torch.float32, device=DEVICE)
        return KVCache.allocate(config, batch, prompt + new_tokens - 1, **options)

    for compiled in sorted({False, "compiled" in modes}):
        at_fault = f"depth {config.depth}, compile {compiled}"
        cache = empty_cache(2)
        options = dict(compile=compiled, cache=cache, progress=False)
        for i, new in enumerate(generate(model, prompts, new_tokens, **options)):
            text = torch.cat((prompts[i], new))[None]
            first, end = len(prompts[i]), text.shape[1] - 1
            logits = model(text)[0, first - 1 : -1]
            short = logits.amax(-1) - logits.gather(-1, new[:, None])[:, 0]
            if not (short <= ROUNDING * logits.abs().max()).all():
                raise SystemExit(f"wrong tokens: {at_fault}")

            expected = empty_cache(1)
            length = torch.tensor([end], dtype=torch.int32, device=DEVICE)
            prefill(model, text[:, :end], length, expected, chunk=end)
            for x, y in zip((*cache.k, *cache.v), (*expected.k, *expected.v), strict=True):
                x, y = x[i, first:end], y[0, first:end]
                if not (x - y).norm() <= ROUNDING * y.norm():
                    raise SystemExit(f"wrong keys or values: {at_fault}")
    ready()
    return {}


def median_ms(run: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()  # its results come back to the host, so that it waits for the device
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(
    ready: Callable[[], None],
    config: MoDAConfig,
    batch: int,
    prompt: int,
    compiled: bool,
    arguments: argparse.Namespace,
) -> Row:
    model = make_model(config, torch.bfloat16 if CUDA else torch.float32)
    prompts, new_tokens = make_prompts(batch, prompt, config.vocab_size), arguments.new_tokens

    def run(tokens: int) -> Callable[[], object]:
        return lambda: generate(model, prompts, tokens, compile=compiled, progress=False)

    first_call = median_ms(run(new_tokens), 1)
    ready()
    run(new_tokens)()
    prefill, whole = median_ms(run(1), arguments.runs), median_ms(run(new_tokens), arguments.runs)
    step = (whole - prefill) / (new_tokens - 1)
    row: Row = dict(
        depth=config.depth,
        batch=batch,
        prompt=prompt,
        compile=compiled,
        parameters=model.num_parameters(),
        prefill_ms=prefill,
        step_ms=step,
        tokens_per_s=1e3 * batch / step,
        first_call_s=first_call / 1e3,
    )
    if CUDA:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def line(values: Iterable[object]) -> str:
    return " ".join(f"{value!s:>10}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32] if CUDA else [1, 4])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 1024] if CUDA else [16])
    parser.add_argument("--new-tokens", type=int, default=128 if CUDA else 8, help="at least 2")
    parser.add_argument("--runs", type=int, default=5 if CUDA else 3, help="timed runs of a row")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seconds", type=float, default=1e6, help="stop after this time")
    jobs = 6 if CUDA else 1
    parser.add_argument("--jobs", type=int, default=jobs, help="that get ready at the same time")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    config = MoDAConfig(**{name: getattr(arguments, name) for name in SIZES})
    head: Row = machine(DEVICE)
    head |= {name: getattr(arguments, name) for name in ("new_tokens", "runs", *SIZES)}
    print(*(f"{name} {value}" for name, value in head.items()), sep=", ")
    configs = {depth: replace(config, depth=depth) for depth in DEPTHS}
    prompt, new_tokens = min(arguments.prompts), 16 if CUDA else 4
    checks = [(check, c, prompt, new_tokens, arguments.modes) for c in configs.values()]
    cases = itertools.product(arguments.batches, arguments.prompts, arguments.modes, DEPTHS)
    rows = [
        (measure, configs[depth], batch, prompt, mode == "compiled", arguments)
        for batch, prompt, mode, depth in cases
    ]
    try:
        report(head, results([*checks, *rows], arguments.jobs, deadline), arguments.json)
    except TimeoutError:
        print(f"{arguments.seconds:.0f} seconds are over")


def report(head: Row, found: Iterator[Row], written: pathlib.Path | None) -> None:
    """Print rows as they come, each beside the last one of the first depth."""
    for _ in DEPTHS:
        next(found)
    print("generated texts are right")
    print(line(heading for heading, _ in COLUMNS.values()), flush=True)
    rows: list[Row] = []
    for row in found:
        if row["depth"] == DEPTHS[0]:
            baseline = row
        for part in ("prefill", "step"):
            row[f"{part}_ratio"] = row[f"{part}_ms"] / baseline[f"{part}_ms"]
        rows.append(row)
        values = (
            format(row[name], form) if name in row else "" for name, (_, form) in COLUMNS.items()
        )
        print(line(values), flush=True)
        if written:
            written.write_text(json.dumps(dict(**head, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
