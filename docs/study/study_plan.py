"""The plan of the study: what runs.json says, as one :class:`Run` for each training run."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moda_ops.nn import MoDAConfig
from moda_ops.policies import first_and_recent, recent

POLICIES = {"recent": recent, "first and recent": first_and_recent(1)}
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One model, trained once.

    Attributes:
        name: unlike that of every other run.
        group: of runs in the plan.
        model: the model's name in the plan.
        seed: of the weights and of the order of the text.
        tokens: that it trains on.
        lr: the highest learning rate; None is that of the best run in ``lr_from``.
        lr_from: the group and the model whose runs tell the learning rate.
        options: of the model, see :func:`model_config`.
        training: batch, length, schedule and so on, of all runs.
        predicted_s: how long it takes on the machine that the plan names.
    """

    name: str
    group: str
    model: str
    seed: int
    tokens: int
    lr: float | None
    lr_from: tuple[str, str] | None
    options: dict[str, Any]
    training: dict[str, Any]
    predicted_s: float

    @property
    def steps(self) -> int:
        """Steps of optimization."""
        return self.tokens // (self.training["batch"] * self.training["length"])


def read_plan(path: Path) -> tuple[list[Run], dict[str, Any]]:
    """All runs in the order of the file, and the file."""
    plan = json.loads(path.read_text())
    runs = []
    for group, entry in plan["groups"].items():
        rates = entry["lr"] if isinstance(entry["lr"], list) else [None]
        for model, lr, seed in product(entry["models"], rates, entry["seeds"]):
            options = plan["models"][model]
            seconds = plan["start_s"] + entry["tokens"] / options["tokens_per_s"]
            rate = "" if lr is None else f"-lr{lr:g}"
            source = None if lr is not None else (entry["lr"]["from"], options.get("lr_as", model))
            runs.append(
                Run(
                    f"{group}-{model}{rate}-seed{seed}", group, model, seed, entry["tokens"],
                    lr, source, plan["sizes"] | options, plan["training"], seconds,
                )
            )  # fmt: skip
    return runs, plan


def model_config(options: dict[str, Any]) -> MoDAConfig:
    """The model: options of :class:`MoDAConfig`, and ``budget`` and ``policy`` of a bounded one."""
    fields = MoDAConfig.__dataclass_fields__
    config = MoDAConfig(**{name: value for name, value in options.items() if name in fields})
    if "budget" in options:
        config = config.bounded(options["budget"], POLICIES[options["policy"]])
    return config


def read_records(paths: Iterable[Path]) -> list[Record]:
    """The lines of files of records, as far as the files are there."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def best_lr(run: Run, runs: Iterable[Run], records: Iterable[Record]) -> float | None:
    """The run's learning rate; None as long as runs that it depends on have not ended."""
    if run.lr_from is None:
        return run.lr
    ends = {record["run"]: record for record in records if record["what"] == "end"}
    sources = [source for source in runs if (source.group, source.model) == run.lr_from]
    if not sources:
        raise ValueError(f"{run.name}: no run of group and model {run.lr_from} is in the plan")
    if any(source.name not in ends for source in sources):
        return None
    losses = {ends[source.name]["lr"]: ends[source.name]["held_out_loss"] for source in sources}
    return min(losses, key=lambda lr: math.inf if losses[lr] is None else losses[lr])
