"""Draw the study's figures and write its tables, from records alone.

    python docs/study/plot.py RECORDS.jsonl... --output FOLDER

curves.svg          held-out loss against tokens and against device time: mean over seeds, and the
                    range of the seeds
learning_rate.svg   the last held-out loss against the learning rate
position.svg        the last held-out loss by position in the window
depth_mass.svg      how much of its attention each layer gives to each depth slot
tables.md           every run, every model, every pair of models

The interval of a pair is the 95 % confidence interval of the mean difference over seeds, of
Student's t distribution (https://doi.org/10.1093/biomet/6.1.1), by ``scipy.stats.ttest_rel``. It
holds for one pair that was chosen beforehand, not for the best of many.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Record = dict[str, Any]
Models = dict[tuple[str, str], list[Record]]


def read(paths: Iterable[Path]) -> tuple[list[Record], dict[str, list[Record]]]:
    """The ends of runs, and the evaluations of each run in order; a line that is twice counts once.

    A run that has no end has evaluations alone.
    """
    ends: dict[str, Record] = {}
    evaluations: dict[str, dict[int, Record]] = defaultdict(dict)
    for path in paths:
        for record in map(json.loads, path.read_text().splitlines()):
            if record["what"] == "end":
                ends.setdefault(record["run"], record)
            else:
                evaluations[record["run"]].setdefault(record["step"], record)
    ordered = {run: [steps[n] for n in sorted(steps)] for run, steps in evaluations.items()}
    return list(ends.values()), ordered


def by_model(ends: Iterable[Record]) -> Models:
    """Runs of each (group, model) that differ in seed alone, which those of a sweep do not."""
    models: Models = defaultdict(list)
    for end in sorted(ends, key=lambda end: (end["group"], end["model"], end["seed"])):
        models[end["group"], end["model"]].append(end)
    return {key: runs for key, runs in models.items() if len({run["lr"] for run in runs}) == 1}


def difference(a: Sequence[Record], b: Sequence[Record]) -> tuple[list[int], float, Any] | None:
    """Shared seeds, mean of a - b over them, and its interval; None without two seeds."""
    from scipy.stats import ttest_rel

    losses = [{run["seed"]: run["held_out_loss"] for run in runs} for runs in (a, b)]
    seeds = [s for s in losses[0] if None not in (losses[0][s], losses[1].get(s))]
    if len(seeds) < 2:
        return None
    x, y = ([one[seed] for seed in seeds] for one in losses)
    interval = ttest_rel(x, y).confidence_interval(0.95)
    return seeds, mean(x) - mean(y), interval


def table(heading: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return "none" if value is None else f"{value:.4f}" if type(value) is float else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(v) for v in row] for row in rows)]
    return "\n".join([f"## {heading}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def tables(ends: list[Record], evaluations: dict[str, list[Record]]) -> str:
    """All of tables.md."""
    models = by_model(ends)
    every = [
        (
            end["run"], f"{end['lr']:g}", f"{end['trained_tokens']:,}", end["held_out_loss"],
            f"{end['parameters']:,}", f"{end['forward_flops_per_token'] / 1e6:.1f}",
            f"{end['tokens_per_s'] or 0:,.0f}", f"{end['device_s'] or 0:.0f}",
            f"{end['predicted_s']:.0f}", end["machine"]["device"],
        )
        for end in ends
    ]  # fmt: skip
    for run in evaluations.keys() - {end["run"] for end in ends}:
        every.append((f"{run} (has not ended)", *[""] * 9))
    spread = []
    for (group, model), runs in models.items():
        losses = [run["held_out_loss"] for run in runs if run["held_out_loss"] is not None]
        deviation = stdev(losses) if len(losses) > 1 else None
        spread.append((group, model, len(losses), mean(losses) if losses else None, deviation))
    pairs = []
    for (one, a), (other, b) in combinations(models, 2):
        found = difference(models[one, a], models[other, b]) if one == other else None
        if found is not None:
            seeds, value, (low, high) = found
            pairs.append((one, f"{a} - {b}", len(seeds), value, f"{low:.4f} to {high:.4f}"))
    attention = [
        (group, model, *(mean_of(share, runs) for share in (depth_share, sink_share)))
        for (group, model), runs in models.items()
    ]
    kinds = []
    for (group, model), runs in models.items():
        for kind in sorted({kind for run in runs for kind in run["loss_by_kind"]}):
            parts = [run["loss_by_kind"][kind]["loss"] for run in runs]
            if None not in parts:
                tokens = runs[0]["loss_by_kind"][kind]["tokens"]
                kinds.append((group, model, kind, f"{tokens:,}", mean(parts)))
    text = [
        table("Runs", ["run", "learning rate", "tokens", "held-out loss", "parameters",
                       "forward MFLOPs/token", "tokens/s", "device s", "predicted s", "device"],
              sorted(every)),
        table("Models", ["group", "model", "seeds", "held-out loss", "standard deviation"], spread),
        table("Pairs", ["group", "models", "seeds", "difference", "95 % interval"], pairs),
        table("Attention", ["group", "model", "share of depth", "share of the first key"],
              attention),
        table("Kinds", ["group", "model", "kind", "held-out tokens", "loss"], kinds),
    ]  # fmt: skip
    return "\n".join(text)


def mean_of(share: Callable[[Record], list[float]], runs: Iterable[Record]) -> float | None:
    found = [value for run in runs for value in share(run)]
    return mean(found) if found else None


def depth_share(run: Record) -> list[float]:
    """What all depth slots get together, of each read that has any."""
    return [sum(row) for row in run["depth_mass"] if row and None not in row]


def sink_share(run: Record) -> list[float]:
    return [value for value in run["sink_mass"] if value is not None]


def plot_curves(models: Models, evaluations: dict[str, list[Record]], path: Path) -> None:
    from matplotlib import pyplot as plt

    groups = sorted({group for group, _ in models})
    size = (11, 4 * max(1, len(groups)))
    figure, axes = plt.subplots(
        max(1, len(groups)), 2, figsize=size, layout="constrained", squeeze=False
    )
    for row, group in zip(axes, groups, strict=False):
        for axis, name in zip(row, ("tokens", "device_s"), strict=True):
            for (of, model), runs in models.items():
                curves = [evaluations.get(run["run"], []) for run in runs]
                points = [p for p in zip(*curves, strict=False) if known(p, name)]
                if of != group or not points:
                    continue
                x = [mean(record[name] for record in point) for point in points]
                losses = [[record["held_out_loss"] for record in point] for point in points]
                axis.plot(x, [mean(each) for each in losses], label=model)
                axis.fill_between(x, [*map(min, losses)], [*map(max, losses)], alpha=0.2)
            axis.set(title=group, xlabel=name.replace("device_s", "device time, seconds"))
            axis.set_ylabel("held-out loss, nats per token")
        row[0].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def known(point: Sequence[Record], name: str) -> bool:
    return all(None not in (record[name], record["held_out_loss"]) for record in point)


def plot_lines(lines: dict[str, tuple[list[Any], list[Any]]], labels: Sequence[str], path: Path,
               scale: str = "linear") -> None:  # fmt: skip
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, (x, y) in lines.items():
        axis.plot(x, y, ".-", label=name)
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale=scale)
    if lines:
        axis.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def plot_mass(models: Models, path: Path) -> None:
    from matplotlib import pyplot as plt

    shown = {key: runs[0] for key, runs in models.items() if any(runs[0]["depth_slots"])}
    count = max(1, len(shown))
    figure, axes = plt.subplots(
        1, count, figsize=(4.5 * count, 4), layout="constrained", squeeze=False
    )
    for axis, ((group, model), run) in zip(axes[0], shown.items(), strict=False):
        slots = 1 + max(slot for row in run["depth_slots"] for slot in row)
        grid = [[float("nan")] * slots for _ in run["depth_slots"]]
        for line, row, mass in zip(grid, run["depth_slots"], run["depth_mass"], strict=True):
            for slot, value in zip(row, mass, strict=True):
                line[slot] = float("nan") if value is None else value
        figure.colorbar(axis.imshow(grid, aspect="auto"), ax=axis)
        axis.set(title=f"{group}, {model}", xlabel="depth slot", ylabel="read")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    import matplotlib

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "moda"
    ends, evaluations = read(arguments.records)
    models, folder = by_model(ends), arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(tables(ends, evaluations))
    plot_curves(models, evaluations, folder / "curves.svg")
    rates: dict[str, tuple[list[Any], list[Any]]] = {}
    for end in sorted(ends, key=lambda end: end["lr"]):
        if end["lr_from"] is None and end["held_out_loss"] is not None:
            x, y = rates.setdefault(f"{end['group']}, {end['model']}", ([], []))
            x.append(end["lr"]), y.append(end["held_out_loss"])
    loss = "held-out loss, nats per token"
    plot_lines(rates, ("learning rate", loss), folder / "learning_rate.svg", "log")
    positions = {
        f"{group}, {model}": (
            list(range(1, 1 + len(whole[0]))),
            [mean(part) for part in zip(*whole, strict=True)],
        )
        for (group, model), runs in models.items()
        if (whole := [r["loss_by_position"] for r in runs if None not in r["loss_by_position"]])
    }
    plot_lines(positions, ("part of the window", loss), folder / "position.svg")
    plot_mass(models, folder / "depth_mass.svg")


if __name__ == "__main__":
    main()
