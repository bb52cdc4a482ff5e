"""What a model keeps for backward, by form of its depth stream and number of layers.

    python tests/benchmarks/stream_memory.py [--json FILE]     (peak memory needs a CUDA GPU)

"saved" is the distinct storages that autograd holds after forward, parameters left out; "peak" is
the most memory of forward and backward above what was allocated before, gradients of parameters
left out; "stream" is the keys and values of all slots, once. The model is MoDA with depth "kv+ffn"
in bfloat16: eager, with each block compiled, or compiled whole, which takes minutes from 32 layers.
Every row recompiles. The recompile limit is raised, because a list of slots needs another graph at
every length. Forms of a stream must agree on the logits, to one rounding of bfloat16 per layer; a
row that does not, or fails for another reason than memory, makes the exit code 1.
"""

import argparse
import gc
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "benchmarks")]

from stacked import StackedSlots  # noqa: E402
from train_step import prepare_compilers  # noqa: E402

from moda_ops import DepthSlots  # noqa: E402
from moda_ops.nn import MoDAConfig, MoDALanguageModel  # noqa: E402
from moda_ops.tools.bench.report import machine  # noqa: E402

STREAMS: dict[str, Callable[[], Any]] = {
    "StackedSlots": StackedSlots,
    "DepthSlots": DepthSlots,
    "DepthStream": lambda: None,  # the model begins one
}
MIB = 2**20
Row = dict[str, Any]


def saved_bytes(forward: Callable[[], Tensor], model: MoDALanguageModel) -> int:
    """Bytes of the distinct storages, parameters left out, that autograd holds after forward."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    storages.clear()
    loss.backward()
    return total


def peak_bytes(step: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    stream: str, mode: str, layers: int, arguments: argparse.Namespace
) -> tuple[Row, Tensor]:
    """A row, and the logits."""
    batch, tokens, device = arguments.batch, arguments.tokens, torch.device(arguments.device)
    config = MoDAConfig(
        vocab_size=256,
        layers=layers,
        width=arguments.heads * arguments.head_dim,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        hidden=4 * arguments.heads * arguments.head_dim,
    )
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    with device:
        model: Any = MoDALanguageModel(config).bfloat16()
        ids = torch.randint(config.vocab_size, (batch, tokens))
    for part in dict(eager=[], block=model.blocks, whole=[model])[mode]:
        part.compile(fullgraph=True, backend=arguments.backend)

    def new_logits() -> Tensor:
        logits: Tensor = model(ids, STREAMS[stream]()).float()
        return logits

    def forward() -> Tensor:
        return new_logits().square().mean()

    start = time.perf_counter()
    logits = new_logits()
    logits.square().mean().backward()
    logits = logits.detach().cpu()
    if device.type == "cuda":
        torch.cuda.synchronize()
    row: Row = dict(
        first_call_s=time.perf_counter() - start,
        graphs=counters["stats"]["unique_graphs"],
        stream_mib=config.depth_slots() * batch * tokens * config.kv_width * 2 * 2 / MIB,
        saved_mib=saved_bytes(forward, model) / MIB,
    )
    if device.type == "cuda":
        row["peak_mib"] = peak_bytes(lambda: forward().backward()) / MIB
    return row, logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--layers", nargs="+", type=int, default=[8, 16, 32, 48] if cuda else [2, 4]
    )
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["eager", "block", "whole"],
        choices=["eager", "block", "whole"],
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile; or aot_eager")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row after this time")
    parser.add_argument("--batch", type=int, default=4 if cuda else 2)
    parser.add_argument("--tokens", type=int, default=1024 if cuda else 32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64 if cuda else 16)
    arguments = parser.parse_args()
    start = time.perf_counter()
    prepare_compilers()
    names = "batch", "tokens", "heads", "kv_heads", "head_dim", "backend"
    head: Row = machine(torch.device(arguments.device))
    head |= {name: getattr(arguments, name) for name in names}
    print(*(f"{name} {value}" for name, value in head.items()), sep=", ")
    columns = "stream_mib", "saved_mib", "peak_mib", "first_call_s"
    print(f"{'':14} {'mode':6} {'layers':>6}", *(f"{c:>13}" for c in columns), "graphs", flush=True)
    rows: list[Row] = []
    first: dict[int, Tensor] = {}  # logits of the first row of so many layers
    for mode, layers, stream in product(arguments.modes, arguments.layers, arguments.streams):
        if time.perf_counter() - start > arguments.seconds:
            print(f"{arguments.seconds:.0f} seconds are over")
            break
        row: Row = dict(stream=stream, mode=mode, layers=layers)
        try:
            found, logits = measure(stream, mode, layers, arguments)
            row |= found
            expected = first.setdefault(layers, logits)
            error = ((logits - expected).norm() / expected.norm()).item()
            if not error < layers * torch.finfo(torch.bfloat16).eps:
                row["status"] = f"wrong: logits differ from the first row's by {error:.1e}"
        except torch.OutOfMemoryError:
            row["status"] = "out of memory"
        except Exception as error:  # a run on a lent machine goes on to its next row
            row["status"] = f"failed: {type(error).__name__}"
            traceback.print_exc()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        rows.append(row)
        cells = (f"{row[c]:13,.2f}" if c in row else f"{'':13}" for c in columns)
        end = row.get("graphs", ""), row.get("status", "")
        print(f"{stream:14} {mode:6} {layers:6}", *cells, *end, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(dict(**head, rows=rows), indent=1) + "\n")
    if any(row.get("status", "out of memory") != "out of memory" for row in rows):
        sys.exit("a row is wrong or has failed")


if __name__ == "__main__":
    main()
