"""Draw docs/measurements/h100_operator.svg from h100_operator.json, for light and dark pages.

    python docs/measurements/plot_operator.py [--output FILE.svg]

For each row of the benchmark, forward and backward: how long the operator takes, as a multiple of
cuDNN's time for the sequence part alone. Beside it what there is to do: that part, 1, and the time
to read the depth keys and values once (forward) or to read them and write their gradients
(backward) at the rate of a large copy. Medians of the recorded runs, as in docs/performance.md.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
PASSES = ("forward", "backward")
TRAFFIC = {"forward": 1, "backward": 2}  # how often the bytes of depth pass
TEXT, SEQUENCE, DEPTH, OURS = "#767d88", "#9aa4b0", "#4c8dff", "#f0801a"
BYTES = 2  # of bfloat16

Case = tuple[int, int, int, int, int]


def measurements(recorded: dict) -> dict[Case, dict[tuple[str, str], float]]:
    """For each (T, G, H, L, D) the median milliseconds of each (contender, pass)."""
    times: dict[Case, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in recorded["runs"]:
        for case in run["cases"]:
            shape = tuple(case[name] for name in "TGHLD")
            for row in case["rows"]:
                for part in PASSES:
                    if f"{part}_ms" in row:
                        times[shape][row["contender"], part].append(row[f"{part}_ms"])
    return {
        shape: {key: median(values) for key, values in rows.items()}
        for shape, rows in times.items()
    }


def depth_ms(shape: Case, tb_per_s: float) -> float:
    """Time to read the depth keys and values of this shape once."""
    T, _, H, L, D = shape
    return T * H * L * 2 * D * BYTES / tb_per_s * 1e-9


def main() -> None:
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "h100_operator.svg")
    output = parser.parse_args().output
    recorded = json.loads((HERE / "h100_operator.json").read_text())
    rows = measurements(recorded)
    rate = max(run["copy_tb_per_s"] for run in recorded["runs"])
    plt.rcParams.update(
        {"svg.hashsalt": "moda", "text.color": TEXT, "axes.labelcolor": TEXT, "font.size": 10}
    )
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), sharey=True, layout="constrained")
    labels = [f"T {T}, G {G}, L {L}, D {D}" for T, G, _, L, D in rows]
    for axis, part in zip(axes, PASSES, strict=True):
        cudnn = [times["cuDNN", part] for times in rows.values()]
        depth = [TRAFFIC[part] * depth_ms(shape, rate) for shape in rows]
        depth = [ms / base for ms, base in zip(depth, cudnn, strict=True)]
        ours = [
            times["moda", part] / base for times, base in zip(rows.values(), cudnn, strict=True)
        ]
        places = range(len(rows))
        axis.barh(places, [1] * len(rows), color=SEQUENCE, label="sequence alone, cuDNN")
        axis.barh(places, depth, left=1, color=DEPTH, label="depth keys and values at copy rate")
        axis.plot(ours, places, "D", color=OURS, markersize=7, label="MoDA, measured")
        for place, value in zip(places, ours, strict=True):
            end = max(value, 1 + depth[place])
            axis.annotate(f"{value:.2f}", (end, place), (8, -3.5), textcoords="offset points")
        axis.set_title(part, color=TEXT)
        axis.set_xlabel("time / cuDNN's for the sequence alone")
        axis.set_yticks(list(places), labels)
        axis.set_xlim(0, 3.5)
        axis.tick_params(colors=TEXT)
        for side, spine in axis.spines.items():
            spine.set(color=TEXT, visible=side in ("left", "bottom"))
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    figure.savefig(output, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
