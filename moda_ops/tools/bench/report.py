"""A run: every contender on every case; a table, bench.json, and plots."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moda_ops.tools.bench.contenders import SWEEPS, Case, Contender, contenders, has_authors
from moda_ops.tools.bench.measure import Row, copy_rate, measure, release

AXES = dict(tokens="T", groups="G", slots="L", tiny="L")
"""What grows along a sweep."""


class Limits(NamedTuple):
    """What no implementation is much faster than, in milliseconds; None where unknown.

    The sequence's products as fast as the best library does them (C, Cb), and the depth keys and
    values moved at the copy rate: forward reads them (M), backward reads them and writes their
    gradients (2 M). Whoever overlaps the two perfectly needs the larger.
    """

    C: float | None
    Cb: float | None
    M: float

    def of(self, row: Row, name: str) -> float | None:
        """The limit of what the row's contender does in the pass ``name``."""
        forward = name == "forward"
        parts = [self.C if forward else self.Cb] if row["sequence"] else []
        parts += [self.M if forward else 2 * self.M] if row["depth"] else []
        return None if None in parts else max(part for part in parts if part is not None)


def run(
    output: Path,
    *,
    sweeps: list[str],
    names: list[str],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    echo: Callable[[str], None],
) -> bool:
    """Measure, print a table per case, write bench.json and plots.

    Limits are a GPU's: on a CPU the sizes are tiny, and caches hold all of it.

    Returns:
        Whether no row is wrong, and none failed but of a peer.
    """
    from tabulate import tabulate
    from tqdm import tqdm

    on_gpu = device.type == "cuda"
    entrants = [c for c in contenders(device) if c.name in names]
    record = machine(device) | dict(dtype=str(dtype).removeprefix("torch."))
    if on_gpu:
        rate = copy_rate(device, seconds)
        record["copy_tb_per_s"] = round(rate / 1e9, 3)
    echo(", ".join(f"{name} {value}" for name, value in record.items()))
    if on_gpu:
        echo(
            "x limit: time / the larger of the best library's for the sequence alone and M "
            "(backward 2 M), the time to move depth at the copy rate"
        )
        if not has_authors():
            echo("skipped: the authors' kernel, whose package (hustvl/MoDA) is not installed")
    else:
        echo("on a CPU the operator is plain PyTorch: the times say nothing about Triton's kernels")
    record["cases"] = []
    cases = list(dict.fromkeys(case for sweep in sweeps for case in SWEEPS[sweep]))
    with tqdm(total=len(cases) * len(entrants), unit="row", disable=None) as progress:
        for case in cases:
            rows = []
            for contender in entrants:
                progress.set_description(f"{case}: {contender.name}")
                rows.append(measure(contender, case, dtype, device, seconds))
                release(device)
                progress.update()
            limit = limits(rows, entrants, case.depth_bytes(dtype) / rate) if on_gpu else None
            found = limit._asdict() if limit else {}
            record["cases"].append(dict(**case._asdict(), **found, rows=rows))
            (output / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
            cells = [_cells(row, limit) for row in rows]
            with progress.external_write_mode():
                echo(f"\n{case}" + (f"; M = {limit.M:.3f} ms" if limit else ""))
                echo(tabulate(cells, "keys", "simple", disable_numparse=True))
    for path in (output / "bench.json", *plot(record, sweeps, output)):
        echo(f"wrote {path}")
    peers = {c.name for c in entrants if c.peer}
    statuses = [
        (row["contender"] in peers, row.get("status", ""))
        for case in record["cases"]
        for row in case["rows"]
    ]
    return not any(
        status.startswith("wrong") or (status.startswith("failed") and not peer)
        for peer, status in statuses
    )


def limits(rows: list[Row], entrants: list[Contender], M: float) -> Limits:
    libraries = {c.name for c in entrants if c.sequence and not c.depth}

    def best(ms: str) -> float | None:
        return min((r[ms] for r in rows if r["contender"] in libraries and ms in r), default=None)

    return Limits(best("forward_ms"), best("backward_ms"), M)


def _cells(row: Row, limit: Limits | None) -> dict[str, str]:
    """The row as printed, by headings."""
    cells = {"": row["contender"]}
    for name in ("forward", "backward"):
        ms = row.get(f"{name}_ms")
        cells[f"{name} ms"] = f"{ms:.3f}" if ms else ""
        if limit:
            floor = limit.of(row, name)
            cells[f"{name} x limit"] = f"{ms / floor:.2f}" if ms and floor else ""
    cells["error"] = f"{row['error']:.1e}" if "error" in row else ""
    return cells | {"status": row.get("status", "")}


def machine(device: torch.device) -> Row:
    """Device, versions, date, and the revision of a checkout: what a figure is read with."""
    found: Row = dict(device="cpu", torch=torch.__version__)
    if device.type == "cuda":
        import triton

        found["device"] = torch.cuda.get_device_name(device)
        found |= dict(triton=triton.__version__, cudnn=torch.backends.cudnn.version())
    if (revision := _revision()) is not None:
        found["revision"] = revision
    return dict(**found, date=time.strftime("%Y-%m-%d"))


def _revision() -> str | None:
    """Git's name of the checkout that this file belongs to, None outside of one."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not a repository around an installation
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def plot(record: Row, sweeps: list[str], output: Path) -> list[Path]:
    """Time along each sweep that has an axis, and the share of its limit that each row reaches."""
    points: list[Row] = []
    for case in record["cases"]:
        limit = Limits(case["C"], case["Cb"], case["M"]) if "M" in case else None
        for row in case["rows"]:
            point = dict(row)
            if limit and limit.C and limit.Cb:
                point |= {f"{name}_limit": limit.of(row, name) for name in ("forward", "backward")}
                point |= dict(forward_x=limit.C / limit.M, backward_x=limit.Cb / 2 / limit.M)
            points.append(point)
    paths = []
    for sweep in sweeps:
        if sweep in AXES:
            fields = Case._fields
            swept = [p for p in points if Case(**{n: p[n] for n in fields}) in SWEEPS[sweep]]
            paths.append(output / f"{sweep}.png")
            _plot_times(swept, AXES[sweep], record, paths[-1])
    if any("forward_x" in p for p in points):
        paths.append(output / "limit.png")
        _plot_limits(points, record, paths[-1])
    return paths


def _figure(record: Row) -> tuple[Any, Any]:
    """The two panels of a new figure, and how to save it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"{record['device']}, torch {record['torch']}, {record['dtype']}")

    def save(path: Path) -> None:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=150)

    return panels, save


def _plot_times(points: list[Row], axis: str, record: Row, path: Path) -> None:
    panels, save = _figure(record)
    ticks = sorted({p[axis] for p in points})
    for panel, name in zip(panels, ("forward", "backward"), strict=True):
        for contender in dict.fromkeys(p["contender"] for p in points):
            timed = [p for p in points if p["contender"] == contender and f"{name}_ms" in p]
            timed.sort(key=lambda p: p[axis])
            xs, ys = [p[axis] for p in timed], [p[f"{name}_ms"] for p in timed]
            panel.plot(xs, ys, marker="o", label=contender)
        panel.set(xscale="log", yscale="log", xlabel=axis, title=name)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
    panels[0].set_ylabel("ms")
    save(path)


def _plot_limits(points: list[Row], record: Row, path: Path) -> None:
    panels, save = _figure(record)
    for panel, name in zip(panels, ("forward", "backward"), strict=True):
        for contender in dict.fromkeys(p["contender"] for p in points):
            timed = [p for p in points if p["contender"] == contender]
            timed = [p for p in timed if f"{name}_ms" in p and f"{name}_x" in p]
            shares = [p[f"{name}_limit"] / p[f"{name}_ms"] for p in timed]
            panel.plot([p[f"{name}_x"] for p in timed], shares, "o", label=contender)
        panel.axhline(1, color="gray", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        limits = "C / M" if name == "forward" else "Cb / 2 M"
        panel.set(ylim=(0, None), title=name, xlabel=f"{limits}, sequence / depth at their limits")
    panels[0].set_ylabel("share of the limit reached")
    save(path)
