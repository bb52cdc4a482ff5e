"""Break the code on purpose, one place at a time, and see that the tests fail.

    python tests/mutate.py              # every mutation
    python tests/mutate.py flops vmap   # those whose file or change has one of these words

Each mutation is made in a temporary copy of the tree, and the tests that should notice run there.
One that they do not notice is a test that is missing.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SOURCES = ("", "kernels", "reference")
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "out", "_build", "node_modules")


class Mutation(NamedTuple):
    """``old``, which its file has once, becomes ``new``; ``tests`` are arguments of pytest."""

    file: str
    old: str
    new: str
    tests: str


KERNEL = "tests/kernels/test_attention_kernels.py -k 'masks_and or scale_and or without_keys'"
CHANGES = {  # file: what is changed in it, to what, and the tests that should see it
    "kernels/moda_kernels/masks.py": [
        ("keys <= offs_t + (S - T) + right)", "keys <= offs_t + (S - T) + right + 1)", KERNEL),
        ("seen & (keys >= offs_t + (S - T) - left)", "seen & (keys > offs_t + (S - T) - left)", KERNEL),
        ("last = tl.maximum(tl.minimum(inner_end, end - 1)", "last = tl.maximum(end", KERNEL),
        ("(owners <= tokens) &", "(owners < tokens) &", "tests/kernels/test_chunk_attention_kernels.py -k options"),
    ],
    "kernels/moda_kernels/softmax.py": [
        ("return qk * (scale * LOG2E), 0.0", "return qk * scale, 0.0", KERNEL),
        ("l_i * alpha + tl.sum(p, axis)", "l_i + tl.sum(p, axis)", KERNEL),
    ],
    "kernels/moda_kernels/slots.py": [
        ("t = offs_t.to(tl.int64)\n    PAIRS", "t = offs_t\n    PAIRS", "tests/kernels/test_offsets.py"),
    ],
    "kernels/moda_kernels/decode_split.py": [
        ("there = (page >= 0) & (page < pages)", "there = page >= 0", "tests/kernels/test_decode_kernels.py -k page_that"),
        ("origin -= T", "origin -= 0", "tests/kernels/test_decode_kernels.py -k lengths_around"),
        ("(origin + T > begin)", "(origin > begin)", "tests/kernels/test_decode_kernels.py -k lengths_around"),
    ],
    "kernels/moda_kernels/forward.py": [
        ("l_safe = tl.where(l_i == 0.0, 1.0, l_i)", "l_safe = l_i", KERNEL),
    ],
    "kernels/moda_kernels/backward_delta.py": [
        ("delta -= tl.load(dlse", "delta += tl.load(dlse", KERNEL),
    ],
    "kernels/moda_kernels/backward_dq.py": [
        ("dq = (dq * scale)", "dq = (dq)", KERNEL),
    ],
    "kernels/moda_kernels/bands.py": [
        ("after = index >= _start(cu_q_ptr,", "after = index > _start(cu_q_ptr,", "tests/kernels/test_varlen_kernels.py -k bands"),
    ],
    "kernels/moda_kernels/depth_mass.py": [
        ("acc / T", "acc / RUN", "tests/test_depth_mass.py -k matches"),
    ],
    "moda_ops/operators/eager.py": [
        ("seen &= keys >= position - min(left, T + S)", "seen &= keys > position - min(left, T + S)", "tests/test_ops.py -k matches"),
        ("p.masked_fill(blind[..., None], 0.0) if", "p if", "tests/test_decode.py -k 'room or positions or writes' tests/test_large_numbers.py"),
        ("slope = softcap * capped, 1 - capped * capped", "slope = softcap * capped, 1 - capped", "tests/test_ops.py -k matches"),
        ("grad if more is None else grad + more[:, place]", "grad", "tests/test_stream.py -k list_of_slots"),
        ("if not before <= value <= tokens", "if not 0 <= value <= tokens", "tests/test_varlen.py -k message"),
        ("v_cache[page[there], place[there]] = v_new", "v_cache[page[there], place[there] - 1] = v_new", "tests/test_decode.py -k matches"),
        ("sum(-1) / max(T, 1)", "sum(-1) / max(T - 1, 1)", "tests/test_depth_mass.py -k matches"),
    ],
    "moda_ops/operators/checks.py": [
        ("if len(k_depth) != len(v_depth):", "if False:", "tests/test_errors.py -k message"),
        ("tensor.stride(-1) != 1 and", "False and", "tests/test_errors.py -k message"),
    ],
    "moda_ops/operators/depth_mass.py": [
        ("(position - left <= n)", "(position - left < n)", "tests/test_depth_mass.py -k sink"),
        ("first, after = cu_k[document], cu_q[document + 1]", "first, after = cu_q[document], cu_q[document + 1]", "tests/test_depth_mass.py -k sink"),
        ('Autocast(as_given=("lse",))', "Autocast()", "tests/test_autocast.py"),
    ],
    "moda_ops/rules/autograd.py": [
        ("outer = private.transforms_active()", "outer = False", "tests/test_autograd.py"),
        ("*defaults[len(inputs) :]", "*defaults[len(defaults) :]", "tests/test_autograd.py"),
    ],
    "moda_ops/rules/autocast.py": [
        ("x.dtype is not torch.float64", "True", "tests/test_autocast.py"),
    ],
    "moda_ops/operators/attention_varlen.py": [
        ('"dlse": 1}', '"dlse": 0}', "tests/test_batching.py"),
    ],
    "moda_ops/operators/decode.py": [
        ("(ids >= 0) & (ids < pages)", "ids >= 0", "tests/test_batching.py"),
        ("visible_pairs(N, min(n, capacity)", "visible_pairs(N, min(n, 10**9)", "tests/test_flops.py"),
    ],
    "moda_ops/rules/flops.py": [
        ("(3 * D + 2 *", "(2 * D + 2 *", "tests/test_flops.py"),
    ],
    "moda_ops/rules/sharding.py": [
        ('BY_BATCH_AND_HEAD.packed | {"tokens": 1}', 'BY_BATCH_AND_HEAD.packed | {"tokens": 2}', "tests/test_distributed.py -k 'test_dtensor and tokens'"),
    ],
    "moda_ops/distributed.py": [
        ("-(-T // mesh.size(dim))", "T // mesh.size(dim)", "tests/test_distributed.py -k 'test_dtensor and tokens'"),
    ],
    "moda_ops/stream/guard.py": [
        ("if again and kind is None:", "if False:", "tests/test_stream.py -k written_once"),
        ("record.written >> place & 1 for place", "True for place", "tests/test_stream_guard.py -k not_written"),
    ],
    "moda_ops/stream/operators.py": [
        ("every[row] = grad", "every[row] = grads[0]", "tests/test_stream.py -k kept"),
    ],
    "moda_ops/stream/checkpointing.py": [
        ('== "unpack_hook"', '== "pack_hook"', "tests/test_stream_guard.py -k recomputation"),
    ],
    "moda_ops/nn/layers.py": [
        ("right * cos + left * sin", "right * cos - left * sin", "tests/test_nn.py -k rotation"),
        ("base**-exponent", "base**exponent", "moda_ops/nn/layers.py"),
        ("F.silu(self.gate_proj(x)) * self.up_proj(x)", "F.silu(self.up_proj(x)) * self.gate_proj(x)", "tests/test_nn.py -k dense"),
    ],
    "moda_ops/nn/model.py": [
        ("x + y if self.pre_norm else self.attention_norm(x + y)", "x + y if self.pre_norm else self.attention_norm(x) + y", "tests/test_nn.py -k dense"),
    ],
    "moda_ops/nn/generation.py": [
        ("before >= top_p", "before > 2 * top_p", "tests/test_generation.py -k probabilities"),
        ("hit.int().argmax(1) + 1", "hit.int().argmax(1)", "tests/test_generation.py -k stop"),
        ("(last >= start)", "(last > start)", "tests/test_generation.py -k full_forward"),
    ],
    "moda_ops/nn/context_parallel.py": [
        ("parts[::2], *parts[:0:-2]", "parts[::2], *parts[1::2]", "tests/test_distributed.py -k context_parallel_order"),
    ],
    "moda_ops/hf/model.py": [
        ("(~real).byte().argsort(dim=1, stable=True)", "(~real).byte().argsort(dim=1, stable=True).sort().values", "tests/test_hf.py -k padding"),
        ("masked_fill(~real[..., None], 0)", "masked_fill(real[..., None], 0)", "tests/test_hf.py -k 'padding or smoothing'"),
    ],
    "moda_ops/policies.py": [
        ("return slots[-budget:]", "return slots[:budget]", "tests/test_bounded_slots.py -k polic"),
        ("in table[layer:]", "in table[layer + 1 :]", "tests/test_bounded_slots.py -k polic"),
    ],
    "moda_ops/tools/bench/measure.py": [
        ("if not checked.share <= 1:", "if checked.share > 1e9:", "tests/test_bench.py -k wrong"),
    ],
    "moda_ops/tools/selfcheck.py": [
        ("2 * plain_error + rounding", "1e3 * plain_error + rounding", "tests/test_cli.py -k self_check"),
    ],
    "reference/moda_reference/masks.py": [
        ("(position - left <= n)", "(position - left < n)", "tests/reference/test_visible.py"),
    ],
    "reference/moda_reference/vectorised.py": [
        ("(do * y.out).sum(axis=-1, keepdims=True) - dlse", "(do * y.out).sum(axis=-1, keepdims=True) + dlse", "tests/reference/test_finite_differences.py"),
    ],
}  # fmt: skip
MUTATIONS = [Mutation(file, *change) for file, changes in CHANGES.items() for change in changes]


def copy_tree(tree: Path, destination: Path) -> Path:
    return Path(shutil.copytree(tree, destination, ignore=shutil.ignore_patterns(*LEFT_OUT)))


def applies(mutation: Mutation, tree: Path = ROOT) -> bool:
    """Whether the file is there and has ``old`` once."""
    path = tree / mutation.file
    return path.exists() and path.read_text().count(mutation.old) == 1


def passes(tree: Path, tests: str) -> bool | None:
    """Whether these tests pass in this tree; None if pytest could not run them."""
    paths = os.pathsep.join(str(tree / source) for source in SOURCES)
    environment = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *shlex.split(tests)],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return {0: True, 1: False}.get(done.returncode)


@cache
def passes_unchanged(tree: Path, tests: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return passes(copy_tree(tree, Path(folder, "tree")), tests) is True


def outcome(mutation: Mutation, tree: Path = ROOT) -> str:
    """What the tests say to a copy of the tree with this mutation."""
    if not applies(mutation, tree):
        return "DOES NOT APPLY"
    if not passes_unchanged(tree, mutation.tests):
        return "FAILS ANYWAY"
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_tree(tree, Path(folder, "tree"))
        path = copy / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        passed = passes(copy, mutation.tests)
    return {True: "NOT CAUGHT", False: "caught", None: "DOES NOT RUN"}[passed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="mutations with any of these; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time")
    args = parser.parse_args()
    mutations = [m for m in MUTATIONS if not args.words or any(w in str(m) for w in args.words)]
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = []
        for mutation, said in zip(mutations, pool.map(outcome, mutations), strict=True):
            change = f"{mutation.old!r} -> {mutation.new!r}"
            print(f"{said:14} {mutation.file}: {change}", flush=True)
            outcomes.append(said)
    caught = outcomes.count("caught")
    print(f"{caught} of {len(outcomes)} mutations are caught")
    sys.exit(caught != len(outcomes))


if __name__ == "__main__":
    main()
