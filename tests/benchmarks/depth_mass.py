"""The cost of logging: depth mass and sink mass beside the forward whose probabilities they sum.

    python tests/benchmarks/depth_mass.py [--json FILE]

"read_ms" is the time to move the bytes that depth mass must, once, at the rate of a large copy: q,
depth keys, lse, and what is left per run of tokens. Each result is compared with float64 before it
is timed. Times are medians in milliseconds, on a GPU of CUDA graphs, of inputs that exceed its L2
cache. On a CPU the sizes are tiny and the times mean nothing.
"""

import argparse
import json
import pathlib
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from moda_ops import moda_attention, moda_depth_mass, moda_sink_mass  # noqa: E402
from moda_ops.operators import eager  # noqa: E402
from moda_ops.tools.bench.measure import copy_rate, median_ms  # noqa: E402
from moda_ops.tools.bench.report import machine  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16
CASES = ((4096, 8, 8, 64, 64), (4096, 2, 8, 72, 64)) if CUDA else ((64, 2, 2, 5, 16),)
RUN = 32  # tokens that leave one partial sum
WORST = 1e-3  # error in norm, of sums in float32 of products of bfloat16 numbers
SECONDS = 0.2 if CUDA else 0.001
Row = dict[str, Any]


def case(T: int, G: int, H: int, L: int, D: int, form: str) -> Row:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=DTYPE)

    q, k, v = randn(1, T, G * H, D), randn(1, T, H, D), randn(1, T, H, D)
    slots = randn(L, 1, T, H, 2 * D)  # as a DepthStream has them
    packed = slots.permute(1, 2, 0, 3, 4).split(D, -1)
    depth = packed if form == "packed" else [list(x.unbind(2)) for x in packed]
    _, lse = moda_attention(q, k, v, *depth, return_lse=True)
    mass, sink = moda_depth_mass(q, depth[0], lse), moda_sink_mass(q, k, lse)
    exact = (
        eager.depth_mass(q.double(), [packed[0].double()], lse.double(), D**-0.5, None),
        eager.depth_mass(
            q.double(), [k[:, :1].double().expand(1, T, H, D)], lse.double(), D**-0.5, None
        )[..., 0],
    )
    errors = [((a - e).norm() / e.norm()).item() for a, e in zip((mass, sink), exact, strict=True)]
    if not max(errors) < WORST:
        raise AssertionError(f"errors {errors}")
    runs = -(-T // RUN) * G * H * L * 4
    moved = q.nbytes + packed[0].numel() * 2 + lse.nbytes + 2 * runs + mass.nbytes
    calls = {
        "forward": partial(moda_attention, q, k, v, *depth),
        "depth_mass": partial(moda_depth_mass, q, depth[0], lse),
        "sink_mass": partial(moda_sink_mass, q, k, lse),
    }
    times = {name: median_ms([call], DEVICE, SECONDS) for name, call in calls.items()}
    return dict(
        T=T, G=G, H=H, L=L, D=D, form=form, **times, mib=moved / 2**20, error=max(errors),
        read_ms=moved / copy_rate(DEVICE, SECONDS),
        share=(times["depth_mass"] + times["sink_mass"]) / times["forward"],
    )  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    record: Row = machine(DEVICE) | dict(dtype="bfloat16", rows=[])
    print(", ".join(f"{name} {value}" for name, value in record.items()))
    for sizes in CASES:
        for form in ("packed", "list"):
            row = case(*sizes, form)
            record["rows"].append(row)
            cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print("  " + ", ".join(cells), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
