"""Tokens per second of generation, with the depth stream and without.

    python tests/benchmarks/generate.py [--json FILE]      (made for a CUDA GPU; tiny on a CPU)

The model is MoDA with depth "kv+ffn", and beside it the same with depth "residual"; bfloat16 on a
GPU. Prompts of one length, then greedy tokens; eager, and with the decoding step compiled (on a GPU
a CUDA graph). Prefill is the time of one new token; a step is the time of the others divided by
their number. Times are medians, after a first call that compiles.

First each model is checked in float32: every token must be the full forward's choice at its place,
or as probable as that up to rounding.
"""

import argparse
import gc
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "benchmarks")]

from train_step import prepare_compilers  # noqa: E402

from moda_ops.nn import MoDAConfig, MoDALanguageModel, generate  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES: dict[str, int] = (
    dict(layers=24, width=1024, heads=16, kv_heads=8, head_dim=64, hidden=4096, vocab_size=32_000)
    if CUDA
    else dict(layers=3, width=64, heads=4, kv_heads=2, head_dim=16, hidden=128, vocab_size=97)
)
DEPTHS = ("residual", "kv+ffn")  # the first is what the others are compared with
MODES = ("eager", "compiled")
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
def check(config: MoDAConfig, prompt: int, new_tokens: int) -> None:
    """Greedy tokens against one full forward over each whole text, float32."""
    model = make_model(config, torch.float32)
    longest = make_prompts(2, prompt, config.vocab_size)
    prompts = [longest[0], longest[1, : prompt // 2]]
    for compiled in (False, True):
        for text, new in zip(
            prompts, generate(model, prompts, new_tokens, compile=compiled), strict=True
        ):
            logits = model(torch.cat((text, new))[None])[0, len(text) - 1 : -1]
            short = logits.amax(-1) - logits.gather(-1, new[:, None])[:, 0]
            rounding = 1e-4 * logits.abs().max()
            if (short > rounding).any():
                raise SystemExit(f"wrong tokens: depth {config.depth}, compile {compiled}")


def median_ms(run: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()  # its results come back to the host, so that it waits for the device
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(
    config: MoDAConfig, batch: int, prompt: int, compiled: bool, arguments: argparse.Namespace
) -> Row:
    torch._dynamo.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = make_model(config, torch.bfloat16 if CUDA else torch.float32)
    prompts, new_tokens = make_prompts(batch, prompt, config.vocab_size), arguments.new_tokens

    def run(tokens: int) -> Callable[[], object]:
        return lambda: generate(model, prompts, tokens, compile=compiled, progress=False)

    first_call = median_ms(run(new_tokens), 1)
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
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row after this time")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    arguments = parser.parse_args()
    start = time.perf_counter()
    prepare_compilers()
    config = MoDAConfig(**{name: getattr(arguments, name) for name in SIZES})
    head: Row = dict(
        device=torch.cuda.get_device_name() if CUDA else "cpu",
        torch=torch.__version__,
        new_tokens=arguments.new_tokens,
        runs=arguments.runs,
        **{name: getattr(arguments, name) for name in SIZES},
    )
    if CUDA:
        import triton

        head["triton"] = triton.__version__
    print(*(f"{name} {value}" for name, value in head.items()), sep=", ")
    for depth in DEPTHS:
        check(replace(config, depth=depth), min(arguments.prompts), 16 if CUDA else 4)
    print("greedy tokens are those of the full forward, eager and compiled")
    print(line(heading for heading, _ in COLUMNS.values()), flush=True)
    rows: list[Row] = []
    for batch in arguments.batches:
        for prompt in arguments.prompts:
            for compiled in (mode == "compiled" for mode in arguments.modes):
                baseline: Row | None = None
                for depth in DEPTHS:
                    if time.perf_counter() - start > arguments.seconds:
                        print(f"{arguments.seconds:.0f} seconds are over")
                        return
                    row = measure(replace(config, depth=depth), batch, prompt, compiled, arguments)
                    baseline = baseline or row
                    for part in ("prefill", "step"):
                        row[f"{part}_ratio"] = row[f"{part}_ms"] / baseline[f"{part}_ms"]
                    rows.append(row)
                    values = (
                        format(row[name], form) if name in row else ""
                        for name, (_, form) in COLUMNS.items()
                    )
                    print(line(values), flush=True)
                    if arguments.json:
                        text = json.dumps(dict(**head, rows=rows), indent=1)
                        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
