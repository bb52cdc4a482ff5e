"""``moda-ops bench`` on a CPU: what it writes, and what it does about contenders that are wrong."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from moda_ops import from_authors, moda_attention, to_authors
from moda_ops.tools import cli
from moda_ops.tools.bench import measure, report
from moda_ops.tools.bench.contenders import (
    SWEEPS,
    Case,
    Contender,
    Inputs,
    Passes,
    authors,
    contenders,
    moda,
)
from moda_ops.tools.bench.report import Limits

CPU = torch.device("cpu")
CASE = Case(2, 40, 2, 2, 3, 16)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(
        cli.main, ["bench", "--device", "cpu", "--seconds", "0.001", *arguments]
    )


def bent(change: Any, *, backward: bool = False) -> Any:
    """The operator with one result changed."""

    def prepare(x: Inputs, case: Case) -> Passes:
        right = moda()(x, case)
        if not backward:
            return right._replace(forward=lambda: change(right.forward()))
        assert right.backward is not None
        return right._replace(backward=lambda: [change(g) for g in right.backward()])

    return prepare


def folded(q: Any, k: Any, v: Any, cached_k: Any, cached_v: Any, **options: Any) -> Any:
    """The authors' ``parallel_moda`` as they document it, by our operator."""
    G = options["moda_group_num"]
    arguments = from_authors(q, cached_k, cached_v, moda_group_num=G)
    options = dict(scale=options["scale"], causal=options["is_causal"], return_lse=True)
    result = moda_attention(arguments[0], k, v, *arguments[1:], **options)
    return to_authors(*result, moda_group_num=G)[0]


def test_a_run_writes_figures_and_plots(tmp_path: Path) -> None:
    result = bench("--output", str(tmp_path / "new" / "bench"))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "new" / "bench" / "bench.json").read_text())
    assert record["device"] == "cpu" and record["dtype"] == "float32" and record["revision"]
    assert "plain PyTorch" in result.output and "limit" not in result.output
    assert [Case(**{n: case[n] for n in Case._fields}) for case in record["cases"]] == SWEEPS[
        "tiny"
    ]
    for case in record["cases"]:
        assert [row["contender"] for row in case["rows"]] == [c.name for c in contenders(CPU)]
        for row in case["rows"]:
            assert row["forward_ms"] > 0 and row["backward_ms"] > 0 and 0 < row["share"] <= 1
            assert f"{row['forward_ms']:.3f}" in result.output
    assert "M" not in record["cases"][0]
    written = {path.name: path.read_bytes() for path in (tmp_path / "new" / "bench").iterdir()}
    assert written.keys() == {"bench.json", "tiny.png"}
    assert written["tiny.png"].startswith(b"\x89PNG")


def test_a_row_as_it_is_printed() -> None:
    row: Any = dict(contender="moda", sequence=1, depth=1, forward_ms=3.0, error=1e-3)
    cells = report._cells(row | dict(backward_ms=12.0), Limits(C=1.5, Cb=1.0, M=2.0))
    assert list(cells.values()) == ["moda", "3.000", "1.50", "12.000", "3.00", "1.0e-03", ""]
    cells = report._cells(row | dict(status="out of memory"), None)
    assert list(cells.values()) == ["moda", "3.000", "", "1.0e-03", "out of memory"]


def test_a_run_on_a_gpu_prints_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With rows that a CPU measures."""
    measured = report.measure
    monkeypatch.setattr(report, "machine", lambda device: dict(device="X1", torch="9"))
    monkeypatch.setattr(report, "contenders", lambda device: contenders(CPU))
    monkeypatch.setattr(report, "copy_rate", lambda device, seconds: 1e9)
    monkeypatch.setattr(report, "release", lambda device: None)
    monkeypatch.setattr(
        report, "measure", lambda c, case, dtype, _, s: measured(c, case, dtype, CPU, s)
    )
    lines: list[str] = []
    settings: Any = dict(dtype=torch.float32, device=torch.device("cuda"), seconds=0.001)
    names = [c.name for c in contenders(CPU)]
    assert report.run(tmp_path, sweeps=["tiny"], names=names, echo=lines.append, **settings)
    printed = "\n".join(lines)
    assert "copy_tb_per_s 1.0" in printed and "x limit: time /" in printed and "M = " in printed
    assert "hustvl/MoDA) is not installed" in printed and "plain PyTorch" not in printed
    for case in json.loads((tmp_path / "bench.json").read_text())["cases"]:
        (library,) = (row for row in case["rows"] if row["contender"] == "SDPA")
        assert case["C"] == library["forward_ms"] and case["Cb"] == library["backward_ms"]
        assert (
            case["M"] == Case(**{n: case[n] for n in Case._fields}).depth_bytes(torch.float32) / 1e9
        )
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "tiny.png", "limit.png"}


def test_the_revision_is_the_checkouts_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not that of a repository in which the package is merely installed, and no "None"."""
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    installed = tmp_path / "report.py"
    installed.touch()
    monkeypatch.setattr(report, "__file__", str(installed))
    assert "revision" not in report.machine(CPU)
    subprocess.run([*git, "add", "report.py"], check=True)
    assert report.machine(CPU)["revision"]
    monkeypatch.setenv("PATH", "")  # no Git
    assert "revision" not in report.machine(CPU)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_is_right(dtype: torch.dtype, causal: bool) -> None:
    for contender in contenders(CPU):
        checked = measure.check(contender, CASE._replace(causal=causal), dtype, CPU)
        assert 0 < checked.share <= 1, contender.name


@pytest.mark.parametrize(("factor", "status"), [(1, None), (1.01, "wrong: error 1.0e-02")])
def test_the_authors_forward(
    factor: float, status: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("fla.ops.moda")
    package.parallel_moda = lambda *a, **options: factor * folded(*a, **options)  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops", "fla.ops.moda"):
        monkeypatch.setitem(sys.modules, name, package)
    contender = Contender("authors", True, True, authors, peer=True)
    row = measure.measure(contender, CASE, torch.float32, CPU, 0.001)
    assert row.get("status") == status
    assert ("forward_ms" in row) == (status is None) and "backward_ms" not in row


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_a_wrong_row_is_not_timed(factor: float, backward: bool) -> None:
    wrong = Contender("wrong", True, True, bent(lambda x: x * factor, backward=backward))
    row = measure.measure(wrong, CASE, torch.float32, CPU, 0.001)
    assert row["status"].startswith("wrong: error ") and "forward_ms" not in row


def test_a_wrong_row_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(x: Inputs, case: Case) -> Passes:
        raise RuntimeError("no such kernel\nand more")

    wrong = Contender("wrong", True, True, bent(lambda out: out * 1.001))
    failing = Contender("failing", True, True, refuse)
    peer = failing._replace(peer=True)
    settings = dict(dtype=torch.float32, device=CPU, seconds=0.001, sweeps=["tiny"])
    for entrants, right in (([peer], True), ([failing], False), ([peer, wrong], False)):
        entrants = [*entrants, Contender("moda", True, True, moda())]
        monkeypatch.setattr(report, "contenders", lambda device, e=entrants: e)
        lines: list[str] = []
        names = [c.name for c in report.contenders(CPU)]
        assert report.run(tmp_path, names=names, echo=lines.append, **settings) == right
        assert "failed: RuntimeError: no such kernel" in "\n".join(lines)
        assert "and more" not in "\n".join(lines)
        assert ("wrong: error 1.0e-03" in "\n".join(lines)) == (wrong in entrants)


FAMILY = Path(__file__).parent / "benchmarks" / "family.py"


@pytest.mark.parametrize("name", ["chunk_attention", "chunk_attention_backward"])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_a_wrong_chunk_is_not_timed(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of one token less or more."""
    family = runpy.run_path(str(FAMILY))
    operator = getattr(torch.ops.moda, name)
    (q, k, v), depth = family["inputs"](64, 1)
    x = [q, k, v, *depth]
    family["check_chunks"](x, *torch.ops.moda.chunk_attention(*x, chunk_size=size), size)

    def other(*arguments: Any, chunk_size: int) -> Any:
        return operator(*arguments, chunk_size=chunk_size - 1 if chunk_size > 1 else 2)

    monkeypatch.setattr(torch.ops.moda, name, other)
    with pytest.raises(AssertionError, match=f"chunk size {size}: errors"):
        family["check_chunks"](x, *torch.ops.moda.chunk_attention(*x, chunk_size=size), size)


@pytest.mark.parametrize("tokens", [64, 200])
@pytest.mark.parametrize("size", [1, 5, 64, 300])
def test_depth_of_a_tile(tokens: int, size: int) -> None:
    """The chunks' depth keys that a forward tile visits, counted one by one."""
    family = runpy.run_path(str(FAMILY))
    tile, L = family["forward_tile"](tokens, size), family["L"]
    visited = []
    for first in range(0, tokens, tile["tile_tokens"]):
        own = range(first, min(first + tile["tile_tokens"], tokens))
        visited.append(
            len({s for t in own for s in range(t + 1) if s // size == t // size or s in own})
        )
    assert tile["tile_depth"] == sum(visited) / len(visited) * L


def test_inputs_take_turns() -> None:
    calls: list[int] = []
    measure.median_ms([lambda i=i: calls.append(i) for i in range(3)], CPU, 1e-9)
    assert calls == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_limits_are_those_of_the_parts_that_take_part() -> None:
    limit = Limits(C=2.0, Cb=5.0, M=3.0)
    both, sequence, depth = (dict(sequence=s, depth=d) for s, d in ((1, 1), (1, 0), (0, 1)))
    assert [limit.of(row, "forward") for row in (both, sequence, depth)] == [3.0, 2.0, 3.0]
    assert [limit.of(row, "backward") for row in (both, sequence, depth)] == [6.0, 5.0, 6.0]
    unknown = limit._replace(C=None)
    assert unknown.of(both, "forward") is None and unknown.of(depth, "forward") == 3.0


def test_sizes_of_a_case() -> None:
    case = Case(2, 8, 3, 2, 5, 16)
    x = Inputs.random(case, torch.bfloat16, CPU, seed=0)
    assert case.depth_bytes(torch.bfloat16) == x.k_depth.nbytes + x.v_depth.nbytes
    assert all(sweep for sweep in SWEEPS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mona"], "'mona' is not among the contenders here: moda, moda, list"),
        (["--sweep", "all"], "--sweep"),
        (["--dtype", "float64"], "--dtype"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_missing_extras_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "tabulate" else object())
    result = bench()
    assert result.exit_code == 1
    assert result.stderr == "Error: moda-ops bench needs tabulate: pip install 'moda-ops[bench]'\n"


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "bench").touch()
    result = bench("--output", str(tmp_path / "bench"))
    assert result.exit_code == 1 and "cannot write to --output" in result.stderr
