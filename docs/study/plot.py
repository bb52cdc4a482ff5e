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
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from study_figures import Evaluations, Models, Record, draw


def read(paths: Iterable[Path]) -> tuple[list[Record], Evaluations]:
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


def tables(ends: list[Record], evaluations: Evaluations) -> str:
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
        middle, lost = mean(losses) if losses else None, len(runs) - len(losses)
        spread.append((group, model, len(runs), lost, middle, deviation))
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
        table("Models", ["group", "model", "seeds", "diverged", "held-out loss",
                         "standard deviation"], spread),
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    ends, evaluations = read(arguments.records)
    models, folder = by_model(ends), arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(tables(ends, evaluations))
    draw(ends, models, evaluations, folder)


if __name__ == "__main__":
    main()
