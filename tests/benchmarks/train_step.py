"""Tokens per second of a training step of a 400M language model, and what the depth stream costs.

    python tests/benchmarks/train_step.py [--json FILE]      (made for a CUDA GPU; tiny on a CPU)

A step is forward, backward and fused AdamW under bfloat16 autocast over float32 parameters, each
block compiled. Variants:

    baseline      no depth; attention by SDPA (cuDNN first); hidden size enlarged to as many
                  parameters as the others have
    DepthStream   MoDA, depth "kv+ffn", one buffer
    DepthSlots    the same as a list of slots; a graph for each number of slots
    StackedSlots  the same, stacked again in each layer

"floor" is what the depth keys and values must cost at 3.0 TB/s: forward reads them once, backward
reads them once and reads and writes their running gradient. The first step of every row is compared
with float64, parameter by parameter, and the row is timed only if its errors are at most twice
those of plain PyTorch in the same dtypes. Times are medians in milliseconds. A row that is wrong or
fails, for another reason than memory, makes the exit code 1.

Rows already in FILE are kept, and measured again only if asked for again, so that a run can be
split. "fit" as a batch is the largest power of two that fits by the memory of the row at batch 1.
--compile-only fills the compilers' caches, which the measuring run then reads: start one process
for each variant, side by side.
"""

import argparse
import copy
import gc
import hashlib
import itertools
import json
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "benchmarks")]

from stacked import StackedSlots  # noqa: E402

from moda_ops import DepthSlots  # noqa: E402
from moda_ops.nn import MoDAConfig, MoDALanguageModel  # noqa: E402
from moda_ops.tools.bench.report import machine  # noqa: E402

BYTES_PER_MS = 3.0e9
DEPTH_PASSES = 4  # forward reads; backward reads, and reads and writes the running gradient
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES: dict[str, int] = (
    dict(layers=24, width=1024, heads=16, head_dim=64, hidden=4096, vocab_size=32_000, tokens=2048)
    if CUDA
    else dict(layers=3, width=64, heads=4, head_dim=16, hidden=128, vocab_size=97, tokens=64)
)
KERNELS = {  # group of the profile: parts of kernel names, first match counts
    "moda forward": ("_moda_forward",),
    "moda backward": ("_moda_backward", "_moda_delta"),
    "moda, both": ("_moda_",),
    "library attention": ("flash", "fmha", "sdpa", "attention"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "xmma"),
    "copies": ("memcpy", "copy_kernel", "copy_device_to_device"),
    "optimizer": ("adam",),
}
COLUMNS = {  # name in a row: heading and format of the table
    "variant": ("variant", ""),
    "G": ("G", ""),
    "batch": ("batch", ""),
    "parameters": ("parameters", ","),
    "ms": ("ms", ".2f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "ratio": ("x baseline", ".3f"),
    "floor_ms": ("floor ms", ".2f"),
    "floor_ratio": ("x at floor", ".3f"),
    "peak_gb": ("peak GB", ".2f"),
    "graph_ms": ("graph ms", ".2f"),
    "graph_speedup": ("speed-up", ".2f"),
    "graph_ratio": ("x baseline", ".3f"),
    "error": ("error", ".1e"),
    "plain_error": ("plain", ".1e"),
    "graphs": ("graphs", ""),
    "first_call_s": ("first s", ".1f"),
}
Row = dict[str, Any]


class LibraryAttention(NamedTuple):
    """A stream without depth whose attention is torch's own."""

    unused: None = None
    written = 0  # slots

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool
    ) -> "tuple[Tensor, LibraryAttention]":
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2), self


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_depth: Tensor | None,
    v_depth: Tensor | None,
    *,
    causal: bool,
) -> Tensor:
    """``moda_attention`` in a few lines of PyTorch, differentiable in any dtype."""
    T, D = q.shape[1], q.shape[-1]
    q = q.unflatten(2, (k.shape[2], -1))  # (B, T, H, G, D)
    scores = torch.einsum("bthgd,bshd->bhgts", q, k)
    if causal:
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if k_depth is not None:
        scores = torch.cat((scores, torch.einsum("bthgd,btlhd->bhgtl", q, k_depth)), -1)
    p = (scores * D**-0.5).softmax(-1)
    out = torch.einsum("bhgts,bshd->bthgd", p[..., :T], v)
    if v_depth is not None:
        out = out + torch.einsum("bhgtl,btlhd->bthgd", p[..., T:], v_depth)
    return out.flatten(2, 3)


class PlainSlots(StackedSlots):
    """What rows must equal; backward computes each layer's scores once more."""

    attention = staticmethod(plain_attention)

    def attend(self, *tensors: Tensor, **options: Any) -> "tuple[Tensor, PlainSlots]":
        attend = partial(super().attend, **options)
        out, _ = checkpoint(attend, *tensors, use_reentrant=False, preserve_rng_state=False)
        return out, self


STREAMS: dict[str, Callable[[], Any]] = {
    "baseline": LibraryAttention,
    "DepthStream": lambda: None,  # the model begins one
    "DepthSlots": DepthSlots,
    "StackedSlots": StackedSlots,
}


def parameters(config: MoDAConfig) -> int:
    with torch.device("meta"):
        return MoDALanguageModel(config).num_parameters()


def config_of(variant: str, sizes: dict[str, int], G: int) -> MoDAConfig:
    options: dict[str, Any] = {name: size for name, size in sizes.items() if name != "tokens"}
    moda = MoDAConfig(**options, kv_heads=sizes["heads"] // G)
    if variant != "baseline":
        return moda
    plain, wanted = replace(moda, depth="residual"), parameters(moda)
    hidden = moda.hidden + (wanted - parameters(plain)) / (3 * moda.width * moda.layers)
    for multiple in (64, 16, 4, 1):  # GEMMs want round sizes
        config = replace(plain, hidden=round(hidden / multiple) * multiple)
        if abs(parameters(config) / wanted - 1) < 0.01:
            return config
    raise AssertionError("no hidden size gives the baseline as many parameters")


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten())


def new_model(config: MoDAConfig) -> MoDALanguageModel:
    torch.manual_seed(0)
    with DEVICE:
        return MoDALanguageModel(config)


def new_tokens(config: MoDAConfig, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets: two random sequences, repeated to fill the batch."""
    generator = torch.Generator().manual_seed(1)
    two = torch.randint(config.vocab_size, (2, tokens + 1), generator=generator).to(DEVICE)
    ids = two[torch.arange(batch, device=DEVICE) % 2]
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Run:
    """A model, compiled, and its training step."""

    def __init__(self, variant: str, config: MoDAConfig, compiler: str, backend: str) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.new_stream = STREAMS[variant]
        self.model: Any = new_model(config)
        self.token_loss: Callable[[Tensor, Tensor], Tensor] = token_loss
        self.optimizer: torch.optim.Optimizer | None = None
        self.reduce_overhead = compiler == "reduce-overhead"
        if compiler != "none":
            self.token_loss = torch.compile(token_loss, backend=backend)
        if compiler == "block":
            for block in self.model.blocks:
                block.compile(backend=backend)
        elif self.reduce_overhead:
            self.model.compile(mode="reduce-overhead")

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.reduce_overhead:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = self.model(inputs, stream=self.new_stream())
        return self.token_loss(logits, targets)

    def gradients(self, inputs: Tensor, targets: Tensor) -> tuple[float, Iterator[Tensor]]:
        """Loss and the gradient of each parameter, by the code that a step runs."""
        loss = self.loss(inputs, targets)
        loss.backward()
        return loss.item(), (p.grad for p in self.model.parameters())

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=1e-4, fused=True, capturable=CUDA
            )
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Reference:
    """Loss and gradients in float64, and the errors of plain PyTorch under autocast."""

    def __init__(self, config: MoDAConfig, inputs: Tensor, targets: Tensor) -> None:
        model = new_model(config)
        self.names = [name for name, _ in model.named_parameters()]
        exact = copy.deepcopy(model).double()
        loss = token_loss(exact(inputs, PlainSlots()), targets)
        gradients = torch.autograd.grad(loss, list(exact.parameters()))
        # In float32 and in host memory: rows may need all of the device's.
        self.loss, self.gradients = loss.item(), [g.float().cpu() for g in gradients]
        del exact, gradients
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = model(inputs, PlainSlots())
        loss = token_loss(logits, targets)
        plain = torch.autograd.grad(loss, list(model.parameters()))
        self.plain_errors = self.errors(loss.item(), iter(plain))

    def errors(self, loss: float, gradients: Iterator[Tensor]) -> list[float]:
        """Relative errors, in norm, of each parameter's gradient, and of the loss."""
        pairs = zip(gradients, self.gradients, strict=True)
        errors = [
            ((g - e).norm() / e.norm()).item() for g, e in ((g, e.to(DEVICE)) for g, e in pairs)
        ]
        return [*errors, abs(loss / self.loss - 1)]

    def check(self, loss: float, gradients: Iterator[Tensor]) -> Row:
        """The worst error, plain PyTorch's worst, and whether any is too large beside plain's."""
        errors, plain = self.errors(loss, gradients), self.plain_errors
        row: Row = dict(error=max(errors), plain_error=max(plain), loss_error=errors[-1])
        wrong = [
            f"{name} {error:.1e}, plain PyTorch {same:.1e}"
            for name, error, same in zip([*self.names, "loss"], errors, plain, strict=True)
            if not error <= 2 * same + torch.finfo(torch.bfloat16).eps / 2
        ]
        if wrong:
            row["status"] = f"wrong: {len(wrong)} of {len(errors)}, " + "; ".join(wrong[:3])
        return row


def milliseconds(f: Callable[[], object], steps: int) -> float:
    """Median time of a call, of calls made one after the other."""
    if not CUDA:
        clock = [time.perf_counter()]
        for _ in range(steps):
            f()
            clock.append(time.perf_counter())
        return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(clock))
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    for _ in range(steps):
        f()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def graph_row(run: Run, data: tuple[Tensor, Tensor], steps: int) -> Row:
    """The whole step as one CUDA graph: its losses must be those of steps outside it."""
    for _ in range(2):
        run.step(*data)
    run.model.zero_grad()  # so that gradients are made in the graph's memory
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        loss = run.step(*data)
    losses = []
    for _ in range(3):
        outside = run.loss(*data).item()
        graph.replay()
        losses.append(loss.item())
        if not abs(losses[-1] / outside - 1) < 1e-3:
            return dict(graph=f"wrong: loss {losses[-1]}, outside the graph {outside}")
    if not losses[-1] < losses[0]:
        return dict(graph=f"wrong: losses {losses} do not fall")
    return dict(graph_ms=milliseconds(graph.replay, steps))


def profile(run: Run, data: tuple[Tensor, Tensor], path: pathlib.Path) -> Row:
    """Write the table of a step's kernels; the sums of their groups, in milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run.step(*data)
        if CUDA:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    sums, kernels = dict.fromkeys((*KERNELS, "rest"), 0.0), []
    for event in events:
        annotation = getattr(event, "is_user_annotation", False)
        if event.device_type == DeviceType.CUDA and not annotation:
            kernels.append(event)
            name = event.key.lower()
            groups = (group for group, parts in KERNELS.items() if any(p in name for p in parts))
            sums[next(groups, "rest")] += event.self_device_time_total / 1e3
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    lines = [f"{ms:10.3f} ms  {group}" for group, ms in sums.items()]
    lines += ["", f"{'ms':>10} {'calls':>6}  kernel"]
    lines += [
        f"{event.self_device_time_total / 1e3:10.3f} {event.count:6}  {event.key[:150]}"
        for event in kernels[:60]
    ]
    order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
    lines += ["", events.table(sort_by=order, row_limit=40, max_name_column_width=80)]
    path.write_text("\n".join(lines) + "\n")
    return dict(profile=sums) if kernels else {}


def attention_backend(config: MoDAConfig, tokens: int) -> str:
    """Which of torch's kernels the baseline's attention calls."""

    def randn(heads: int) -> Tensor:
        shape = 1, tokens, heads, config.head_dim
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    heads = config.heads, config.kv_heads, config.kv_heads
    out, _ = LibraryAttention().attend(*map(randn, heads), causal=True)
    node: Any = out.grad_fn
    while "Attention" not in node.name() and node.next_functions:
        node = node.next_functions[0][0]
    return str(node.name())


def fitting_batch(row: Row) -> int:
    """Largest power of two that fits, by the memory of the row at batch 1."""
    if not CUDA:
        return 2
    room = torch.cuda.get_device_properties(DEVICE).total_memory / 2**30 - 3
    batches = (room - row["state_gb"]) / (row["peak_gb"] - row["state_gb"])
    return 1 << max(int(batches).bit_length() - 1, 0)


class Benchmark:
    """The rows measured so far, in memory, in the file, and on the screen."""

    def __init__(self, arguments: argparse.Namespace, sizes: dict[str, int]) -> None:
        self.arguments, self.sizes, self.failed = arguments, sizes, False
        self.head: Row = machine(DEVICE) | dict(sizes=sizes)
        self.rows: list[Row] = []
        self.references: dict[Any, Reference] = {}
        if arguments.json and arguments.json.exists():
            old = json.loads(arguments.json.read_text())
            self.rows = old.pop("rows")
            if old | dict(date=None) != self.head | dict(date=None):
                raise SystemExit(f"{arguments.json} is of another device, version or size: {old}")

    def find(self, variant: str, G: int, batch: int | None = None) -> Row | None:
        """The timed row, of this batch if there is one, else of the largest if batch is None."""
        rows = [r for r in self.rows if (r["variant"], r["G"]) == (variant, G) and "ms" in r]
        rows = [r for r in rows if batch is None or r["batch"] == batch]
        rows = [r for r in rows if r["compile"] == self.arguments.compile]
        return max(rows, key=lambda row: row["batch"], default=None)

    def reference(self, config: MoDAConfig, batch: int) -> Reference:
        key = config, min(batch, 2)
        if key not in self.references:
            self.references = {k: v for k, v in self.references.items() if k[0] == config}
            data = new_tokens(config, key[1], self.sizes["tokens"])
            self.references[key] = Reference(config, *data)
        return self.references[key]

    def measure(self, variant: str, G: int, batch: int) -> Row:
        config, tokens = config_of(variant, self.sizes, G), self.sizes["tokens"]
        steps = self.arguments.steps
        slot = 2 * 2 * batch * tokens * config.kv_width  # bytes of keys and values in bfloat16
        row = dict(
            variant=variant,
            G=G,
            batch=batch,
            compile=self.arguments.compile,
            parameters=parameters(config),
            hidden=config.hidden,
            slots_read=sum(config.depth_reads()),
        )
        if variant == "baseline":
            row["backend"] = attention_backend(config, tokens)
        else:
            row["floor_ms"] = DEPTH_PASSES * slot * row["slots_read"] / BYTES_PER_MS
        reference = None
        if not self.arguments.compile_only:
            reference = self.reference(config, batch)
            release()
        run = Run(variant, config, self.arguments.compile, self.arguments.backend)
        data = new_tokens(config, batch, tokens)
        start = time.perf_counter()
        loss, gradients = run.gradients(*data)
        row["first_call_s"] = time.perf_counter() - start
        row["graphs"] = counters["stats"]["unique_graphs"] - (self.arguments.compile != "none")
        if reference is None:
            return row
        row |= reference.check(loss, gradients)
        del gradients
        if "status" in row:
            return row
        for _ in range(3):
            run.step(*data)
        if CUDA:
            run.model.zero_grad()
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            row["state_gb"] = torch.cuda.memory_allocated() / 2**30
        row["ms"] = milliseconds(lambda: run.step(*data), steps)
        if CUDA:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        row["tokens_per_s"] = 1e3 * batch * tokens / row["ms"]
        self.compare(row)
        if self.arguments.profile and variant == "DepthStream":
            name = f"{self.arguments.profile.stem}_G{G}_batch{batch}.txt"
            row |= profile(run, data, self.arguments.profile.with_name(name))
        graphs = self.arguments.cudagraphs and self.arguments.compile != "reduce-overhead"
        if graphs and batch == 1 and CUDA:
            try:
                row |= graph_row(run, data, steps)
            except RuntimeError as error:
                row["graph"] = f"failed: {error}"
            self.compare(row)
        return row

    def compare(self, row: Row) -> None:
        """Ratios to the baseline of the same batch, else to its largest, by time per token."""
        own = row["variant"] == "baseline"
        baseline = row if own else self.find("baseline", row["G"], row["batch"])
        baseline = baseline or self.find("baseline", row["G"])
        if baseline is None:
            return
        baseline_ms = baseline["ms"] * row["batch"] / baseline["batch"]
        row["ratio"] = row["ms"] / baseline_ms
        if not own:
            row["floor_ratio"] = 1 + row["floor_ms"] / baseline_ms
        if "graph_ms" in row:
            row["graph_speedup"] = row["ms"] / row["graph_ms"]
        if "graph_ms" in row and "graph_ms" in baseline:
            row["graph_ratio"] = row["graph_ms"] / baseline["graph_ms"]

    def add(self, row: Row) -> None:
        key = "variant", "G", "batch", "compile"
        self.rows = [r for r in self.rows if any(r[k] != row[k] for k in key)] + [row]
        cells = (format(row[x], form) if x in row else "" for x, (_, form) in COLUMNS.items())
        notes = {name: str(row[name]) for name in ("status", "graph", "backend") if name in row}
        print(line(cells), *(f"{name}: {note}" for name, note in notes.items()), flush=True)
        self.failed |= any(note.startswith(("failed", "wrong")) for note in notes.values())
        for group, ms in row.get("profile", {}).items():
            print(f"{ms:24.3f} ms  {group}", flush=True)
        if self.arguments.json and not self.arguments.compile_only:
            text = json.dumps(dict(**self.head, rows=self.rows), indent=1)
            self.arguments.json.write_text(text + "\n")

    def run(self, variant: str, G: int, batch: int) -> bool:
        """Measure a row and add it; whether it fitted in memory."""
        try:
            row = self.measure(variant, G, batch)
        except Exception as error:  # a run on a lent machine goes on to its next row
            memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
            status = "out of memory" if memory else f"failed: {type(error).__name__}: {error}"
            row = dict(variant=variant, G=G, batch=batch, compile=self.arguments.compile)
            row["status"] = " ".join(status.split())[:300]
            if not memory:
                traceback.print_exc()
        self.add(row)
        release()
        return row.get("status") != "out of memory"


def line(cells: Iterable[str]) -> str:
    """Of a table."""
    return " ".join(f"{cell:>12}" for cell in cells)


def prepare_compilers() -> None:
    """Let Dynamo compile each block of a list of slots, and keep stale backward passes away."""
    # A list of slots is one more graph at every length: 48 at 24 layers, beyond Dynamo's limit of 8
    # at which it would run eagerly. A DepthStream needs three, of any number of layers.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 1024
    # Compiled backward passes are cached on disk whatever the operators' formulas say, so that the
    # sources of moda_ops have to be in the key.
    sources = b"".join(path.read_bytes() for path in sorted((ROOT / "moda_ops").rglob("*.py")))
    torch.compiler.config.cache_key_tag = hashlib.sha256(sources).hexdigest()


def release() -> None:
    torch._dynamo.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    parser.add_argument("--variants", nargs="+", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 2, 4], metavar="G")
    parser.add_argument("--batches", nargs="+", default=["1", "fit"], metavar="B|fit")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a row")
    parser.add_argument(
        "--compile",
        default="block",
        choices=["block", "reduce-overhead", "none"],
        help="reduce-overhead compiles the whole model, for minutes",
    )
    parser.add_argument("--backend", default="inductor", help="of blocks; or aot_eager")
    parser.add_argument("--compile-only", action="store_true", help="one pass of each row, no more")
    parser.add_argument("--cudagraphs", action="store_true", help="batch 1 also as a CUDA graph")
    parser.add_argument("--profile", type=pathlib.Path, metavar="FILE.txt", help="of DepthStream")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row after this time")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    arguments = parser.parse_args()
    start = time.perf_counter()
    prepare_compilers()
    benchmark = Benchmark(arguments, {name: getattr(arguments, name) for name in SIZES})
    print(*(f"{k} {v}" for k, v in benchmark.head.items()), sep=", ")
    print("bfloat16 autocast over float32, fused AdamW, compile:", arguments.compile)
    print(line(heading for heading, _ in COLUMNS.values()), flush=True)
    backends = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(backends, set_priority=True))
        if CUDA:  # not the default stream, so that a step can be captured as a graph
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        rows = itertools.product(arguments.groups, arguments.batches, arguments.variants)
        for G, spec, variant in rows:
            if time.perf_counter() - start > arguments.seconds:
                print(f"{arguments.seconds:.0f} seconds are over")
                break
            if spec != "fit":
                benchmark.run(variant, G, int(spec))
                continue
            one = benchmark.find(variant, G, 1)
            batch = fitting_batch(one) if one else 1
            while batch > 1 and not benchmark.run(variant, G, batch):
                batch //= 2
    if benchmark.failed:
        sys.exit("a row is wrong or has failed")


if __name__ == "__main__":
    main()
