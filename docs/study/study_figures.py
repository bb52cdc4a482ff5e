"""The study's figures; plot.py says what each shows."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Record = dict[str, Any]
Models = dict[tuple[str, str], list[Record]]
"""Runs by group and model."""

Evaluations = dict[str, list[Record]]
"""Of each run, in order."""

LOSS = "held-out loss, nats per token"


def draw(ends: list[Record], models: Models, evaluations: Evaluations, folder: Path) -> None:
    """Write all figures."""
    import matplotlib

    matplotlib.use("agg")
    options = {"svg.hashsalt": "moda", "axes.prop_cycle": cycle()}
    with matplotlib.rc_context(options):
        draw_curves(models, evaluations, folder / "curves.svg")
        draw_rates(ends, folder / "learning_rate.svg")
        draw_positions(models, folder / "position.svg")
        draw_mass(models, folder / "depth_mass.svg")


def cycle() -> Any:
    """Twenty colours, each drawn solid and then dashed."""
    from matplotlib import colormaps, cycler

    return cycler(linestyle=["-", "--"]) * cycler(color=colormaps["tab20"].colors)


def draw_curves(models: Models, evaluations: Evaluations, path: Path) -> None:
    from matplotlib import pyplot as plt

    groups = sorted({group for group, _ in models})
    rows = max(1, len(groups))
    figure, axes = plt.subplots(
        rows, 2, figsize=(11, 4 * rows), layout="constrained", squeeze=False
    )
    labels = {"tokens": "tokens", "device_s": "device time, seconds"}
    for row, group in zip(axes, groups, strict=False):
        for axis, (name, label) in zip(row, labels.items(), strict=True):
            for (of, model), runs in models.items():
                curves = [evaluations.get(run["run"], []) for run in runs]
                points = [point for point in zip(*curves, strict=False) if known(point, name)]
                if of != group or not points:
                    continue
                x = [mean(record[name] for record in point) for point in points]
                losses = [[record["held_out_loss"] for record in point] for point in points]
                axis.plot(x, [mean(each) for each in losses], label=model)
                axis.fill_between(x, [*map(min, losses)], [*map(max, losses)], alpha=0.2)
            axis.set(title=group, xlabel=label, ylabel=LOSS)
        add_legend(row[1])
    save(figure, path)


def add_legend(axis: Any) -> None:
    if axis.lines:
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def known(point: Sequence[Record], name: str) -> bool:
    return all(None not in (record[name], record["held_out_loss"]) for record in point)


def draw_rates(ends: list[Record], path: Path) -> None:
    lines: dict[str, dict[float, float]] = {}
    for end in sorted(ends, key=lambda end: (end["group"], end["model"], end["lr"])):
        if end["lr_from"] is None and end["held_out_loss"] is not None:
            points = lines.setdefault(f"{end['group']}, {end['model']}", {})
            points[end["lr"]] = end["held_out_loss"]
    draw_lines(lines, "learning rate", "log", path)


def draw_positions(models: Models, path: Path) -> None:
    lines = {}
    for (group, model), runs in models.items():
        parts = [run["loss_by_position"] for run in runs if None not in run["loss_by_position"]]
        if parts:
            means = map(mean, zip(*parts, strict=True))
            lines[f"{group}, {model}"] = dict(enumerate(means, 1))
    draw_lines(lines, "part of the window", "linear", path)


def draw_lines(lines: dict[str, dict[Any, float]], label: str, scale: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, points in lines.items():
        axis.plot(list(points), list(points.values()), marker=".", label=name)
    axis.set(xlabel=label, ylabel=LOSS, xscale=scale)
    add_legend(axis)
    save(figure, path)


def draw_mass(models: Models, path: Path) -> None:
    """Of the first seed: a row for each read of depth, a column for each slot."""
    from matplotlib import pyplot as plt

    shown = {key: runs[0] for key, runs in models.items() if any(runs[0]["depth_slots"])}
    rows = max(1, -(-len(shown) // 3))
    figure, axes = plt.subplots(
        rows, 3, figsize=(12, 3.6 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, ((group, model), run) in zip(axes.flat, shown.items(), strict=False):
        read = [*filter(None, run["depth_slots"])], [*filter(None, run["depth_mass"])]
        slots = 1 + max(slot for row in read[0] for slot in row)
        grid = [[float("nan")] * slots for _ in read[0]]
        for line, row, mass in zip(grid, *read, strict=True):
            for slot, value in zip(row, mass, strict=True):
                line[slot] = float("nan") if value is None else value
        figure.colorbar(axis.imshow(grid, aspect="auto", interpolation="nearest"), ax=axis)
        axis.set(title=f"{group}, {model}", xlabel="depth slot", ylabel="read of depth")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
