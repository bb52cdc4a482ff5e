"""Forward and backward at the training shapes of docs/performance.md, beside what limits them.

    python tests/benchmarks/attention_rows.py [--json FILE]      (needs a CUDA GPU)

C and Cb are cuDNN's forward and backward on the sequence part alone (SDPA, causal), M the time to
read the depth keys and values once at the rate of a large device-to-device copy. All are medians of
one run in milliseconds, with the L2 cache flushed before each call. A row is timed only if its
results agree with float64 on the last tokens.
"""

import argparse
import json
import pathlib
import sys

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from moda_ops import eager  # noqa: E402

attention = torch.ops.moda.attention.default
attention_backward = torch.ops.moda.attention_backward.default
ROWS = [  # T, G, H, L, D
    (4096, 8, 8, 64, 64),
    (4096, 2, 8, 72, 64),
    (4096, 1, 16, 24, 64),
    (16384, 2, 8, 64, 64),
    (16384, 8, 8, 64, 64),
    (16384, 32, 8, 64, 64),
    (16384, 8, 8, 256, 64),
    (4096, 8, 8, 64, 128),
]


def randn(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def median_ms(f) -> float:
    return do_bench(f, warmup=15, rep=60, return_mode="median")


def graph_ms(f) -> float:
    """Device time alone: the call replayed as a CUDA graph."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return median_ms(graph.replay)


def copy_rate() -> float:
    """Bytes per millisecond, read and written, of a device-to-device copy of 2 GB."""
    a, b = torch.empty(2, 2**30, dtype=torch.int8, device="cuda").unbind(0)
    return 2 * a.numel() / median_ms(lambda: b.copy_(a))


def library_ms(T: int, G: int, H: int, D: int) -> tuple[float, float]:
    q, k, v = (randn(1, T, h, D).transpose(1, 2).requires_grad_() for h in (G * H, H, H))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):

        def forward():
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G > 1)

        out = forward()
        dout = torch.randn_like(out)
        return median_ms(forward), median_ms(
            lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        )


def error(q, k, v, k_depth, v_depth, last: int = 64) -> float:
    """Largest relative error, in norm, of all results of the last tokens against float64."""
    out, lse = attention(q, k, v, k_depth, v_depth)
    dout = torch.zeros_like(out)
    dout[:, -last:] = torch.randn_like(dout[:, -last:])
    grads = attention_backward(dout, None, q, k, v, k_depth, v_depth, out, lse)
    tail = [x[:, -last:].double() for x in (q, k_depth[0], v_depth[0], dout)]
    options = (q.shape[-1] ** -0.5, None, 0, None)
    arguments = (tail[0], k.double(), v.double(), [tail[1]], [tail[2]])
    exact_out, exact_lse = eager.attention(*arguments, *options)
    exact = eager.attention_backward(tail[3], None, *arguments, exact_out, exact_lse, *options)
    pairs = [
        (out[:, -last:], exact_out),
        (grads[0][:, -last:], exact[0]),
        (grads[1], exact[1]),
        (grads[2], exact[2]),
        (grads[3][0][:, -last:], exact[3][0]),
        (grads[4][0][:, -last:], exact[4][0]),
    ]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def measure(T: int, G: int, H: int, L: int, D: int, bytes_per_ms: float) -> dict[str, float]:
    q, k, v = randn(1, T, G * H, D), randn(1, T, H, D), randn(1, T, H, D)
    k_depth, v_depth = [randn(1, T, L, H, D)], [randn(1, T, L, H, D)]
    row = dict(T=T, G=G, H=H, L=L, D=D, error=error(q, k, v, k_depth, v_depth))
    if not row["error"] < 1e-2:
        return row
    row["C"], row["Cb"] = library_ms(T, G, H, D)
    row["M"] = 2 * k_depth[0].nbytes / bytes_per_ms
    out, lse = attention(q, k, v, k_depth, v_depth)
    dout = torch.randn_like(out)
    slots = [list(map(torch.clone, x[0].unbind(2))) for x in (k_depth, v_depth)]
    for name, depth in (("packed", (k_depth, v_depth)), ("list", slots)):
        row[f"forward_{name}"] = graph_ms(lambda: attention(q, k, v, *depth))  # noqa: B023
        row[f"backward_{name}"] = graph_ms(
            lambda: attention_backward(dout, None, q, k, v, *depth, out, lse)  # noqa: B023
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    bytes_per_ms = copy_rate()
    device = torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}, triton {triton.__version__}, bfloat16, B = 1, causal"
    )
    print(f"copy {bytes_per_ms / 1e9:.2f} TB/s")
    columns = "C", "Cb", "M", "forward_packed", "forward_list", "backward_packed", "backward_list"
    print(f"{'T, G, H, L, D':24}", *(f"{name:>16}" for name in columns), f"{'error':>9}")
    rows = []
    for shape in ROWS:
        row = measure(*shape, bytes_per_ms)
        rows.append(row)
        figures = (f"{row[name]:16.3f}" if name in row else f"{'wrong':>16}" for name in columns)
        print(f"{', '.join(map(str, shape)):24}", *figures, f"{row['error']:9.1e}", flush=True)
        torch.cuda.empty_cache()
    if arguments.json:
        versions = dict(torch=torch.__version__, triton=triton.__version__)
        arguments.json.write_text(json.dumps(dict(device=device, **versions, rows=rows), indent=1))


if __name__ == "__main__":
    main()
