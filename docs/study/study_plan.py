"""The plan of the study: one :class:`Run` for each training run of runs.json; and the records."""

import fcntl
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moda_ops.nn import MoDAConfig
from moda_ops.policies import SlotPolicy, first_and_recent, most_mass, recent

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

    def settings(self, lr: float, text: str) -> Record:
        """What the result depends on, as JSON gives it back; ``text`` is the hash of the text."""
        options = {k: v for k, v in self.options.items() if k not in ("tokens_per_s", "source")}
        return dict(
            seed=self.seed,
            tokens=self.tokens,
            lr=lr,
            text=text,
            options=options,
            training=self.training,
        )

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


def model_config(options: dict[str, Any], records: Iterable[Record] = ()) -> MoDAConfig:
    """The model that options of the plan stand for.

    They are those of :class:`MoDAConfig`. A bounded model has ``budget`` and ``policy`` too, which
    is one of ``POLICIES``, or "most mass of" the run ``mass_from``, whose end is among the records.
    """
    fields = MoDAConfig.__dataclass_fields__
    config = MoDAConfig(**{name: value for name, value in options.items() if name in fields})
    if "budget" in options:
        config = config.bounded(options["budget"], _policy(options, records))
    return config


def _policy(options: dict[str, Any], records: Iterable[Record]) -> SlotPolicy:
    if options["policy"] != "most mass of":
        return POLICIES[options["policy"]]
    return most_mass(ends_of(records)[options["mass_from"]]["depth_mass"])


def ends_of(records: Iterable[Record]) -> dict[str, Record]:
    """The record of the end of each run that has ended."""
    return {record["run"]: record for record in records if record["what"] == "end"}


def read_records(paths: Iterable[Path]) -> list[Record]:
    """The lines of files of records, as far as the files are there."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def append(path: Path, record: Record) -> None:
    """One line; other processes may append to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.write(json.dumps(record, allow_nan=False) + "\n")


def missing(run: Run, runs: Iterable[Run], records: Iterable[Record]) -> list[str]:
    """The runs that this one depends on and that have not ended."""
    needed = [source.name for source in sources(run, runs)]
    if "mass_from" in run.options:
        needed.append(run.options["mass_from"])
    return [name for name in needed if name not in ends_of(records)]


def sources(run: Run, runs: Iterable[Run]) -> list[Run]:
    """The runs that tell this one's learning rate; none if the plan gives it."""
    found = [source for source in runs if (source.group, source.model) == run.lr_from]
    if run.lr is None and not found:
        raise ValueError(f"{run.name}: no run of group and model {run.lr_from} is in the plan")
    return found


def best_lr(run: Run, runs: Iterable[Run], records: Iterable[Record]) -> float:
    """The run's learning rate, once the runs that it depends on have ended."""
    if run.lr is not None:
        return run.lr
    ends = ends_of(records)
    tried = [ends[source.name] for source in sources(run, runs)]
    losses = {end["lr"]: end["held_out_loss"] for end in tried}
    return min(losses, key=lambda lr: math.inf if losses[lr] is None else losses[lr])
