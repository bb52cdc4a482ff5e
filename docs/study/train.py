"""Train the runs of a plan and append what is measured to a file of records.

    python docs/study/train.py docs/study/runs.json --list
    python docs/study/train.py docs/study/runs.json --records FILE.jsonl

A run that has ended is not run again, and one that was interrupted goes on from its checkpoint with
the same tokens in the same order. On several GPUs start a process for each, "--process 0/4" to
"--process 3/4" and all else the same: each takes the next run that nobody has, the longest first.
A run that takes its learning rate or its depth slots from other runs waits until they have ended.

Records are lines of JSON: "evaluation" of a run, one for every evaluation, and "end" of a run.
"""

import argparse
import fcntl
import fnmatch
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

from study_measure import HeldOut, attention_report, finite  # noqa: E402
from study_plan import (  # noqa: E402
    Record,
    Run,
    best_lr,
    ends_of,
    missing,
    model_config,
    read_plan,
    read_records,
)
from study_text import Text  # noqa: E402
from study_training import Training  # noqa: E402

from moda_ops.bench.report import machine  # noqa: E402


def train(training: Training, text: Text, arguments: argparse.Namespace, bar: Any) -> None:
    """Train one run to its end, from its checkpoint if there is one."""
    run = training.run
    options, device = run.training, arguments.device
    checkpoint = arguments.checkpoints / f"{run.name}.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    bar.reset(run.steps * options["batch"] * options["length"])
    bar.set_description(run.name)
    bar.update(training.step * options["batch"] * options["length"])
    recorded = {(record["run"], record.get("step")) for record in read_records([arguments.records])}
    held_out = HeldOut(text, options["held_out_windows"], options["batch"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    every, lost = options["evaluate_every"], False
    while training.step < run.steps and not lost:
        until = min(training.step - training.step % every + every, run.steps)
        loss = training.train(text, until, bar)
        tokens = until * options["batch"] * options["length"]
        rate = training.tokens_per_s
        record: Record = dict(what="evaluation", run=run.name, step=until, tokens=tokens)
        record["device_s"] = None if rate is None else tokens / rate
        record["training_loss"] = finite(loss)
        record["held_out_loss"] = held_out.loss(training.model)
        if (run.name, until) not in recorded:  # or it was interrupted between these two
            append(arguments.records, record)
        training.save(checkpoint)
        lost = record["training_loss"] is None  # and no step brings it back
    append(arguments.records, ending(training, text, held_out, arguments.compile))
    checkpoint.unlink(missing_ok=True)


def ending(training: Training, text: Text, held_out: HeldOut, compiler: str) -> Record:
    """The record of a run that has ended."""
    run, model, device = training.run, training.model, training.device
    length = run.training["length"]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    tokens, rate = training.step * run.training["batch"] * length, training.tokens_per_s
    return dict(
        what="end",
        run=run.name,
        group=run.group,
        model=run.model,
        lr_from=run.lr_from,
        **training.settings,
        predicted_s=run.predicted_s,
        compile=compiler,
        trained_tokens=tokens,
        parameters=model.num_parameters(),
        forward_flops_per_token=model.flops(1, length) / length,
        tokens_per_s=rate,
        device_s=None if rate is None else tokens / rate,
        peak_gib=peak,
        bytes_per_token=text.about["held_out"]["bytes"] / text.about["held_out"]["tokens"],
        machine=machine(device),
        depth_keep=model.config.depth_keep,
        **held_out.report(model),
        # Of training text: a policy may choose slots by it.
        **attention_report(model, text.batch(run.seed, 0, min(8, run.training["batch"]))[:, :-1]),
    )


def append(path: Path, record: Record) -> None:
    """One line; other processes may append to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.write(json.dumps(record, allow_nan=False) + "\n")


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether no other process has this run; the claim ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def check_settings(run: Run, end: Record, text: Text) -> None:
    """Stop if a run of this name has ended that is not this run."""
    settings = run.settings(end["lr"] if run.lr is None else run.lr, text.hash)
    changed = [name for name, value in settings.items() if end[name] != value]
    if changed:
        sys.exit(f"{run.name} is recorded with other settings: {', '.join(changed)}")


def work(chosen: list[Run], runs: list[Run], text: Text, arguments: argparse.Namespace) -> None:
    """Train what is left of the chosen runs, the longest first, until nothing is left."""
    from tqdm import tqdm

    def records() -> list[Record]:
        return read_records([arguments.records, *arguments.earlier])

    failed: list[str] = []
    longest_first = sorted(chosen, key=lambda run: run.predicted_s, reverse=True)
    with tqdm(unit=" tokens", unit_scale=True, position=arguments.process[0], disable=None) as bar:
        while True:
            busy, waiting, tried = [], [], False
            for run in longest_first:
                if run.name in failed:
                    continue
                with claim(arguments.checkpoints / f"{run.name}.lock") as mine:
                    known = records()
                    if end := ends_of(known).get(run.name):
                        check_settings(run, end, text)
                        continue
                    if not mine:
                        busy.append(run.name)
                    elif needed := missing(run, runs, known):
                        waiting.append(f"{run.name} (needs {', '.join(needed)})")
                    else:
                        try:
                            config = model_config(run.options, known)
                            settings = run.settings(best_lr(run, runs, known), text.hash)
                            training = Training(
                                run, config, settings, arguments.device, arguments.compile
                            )
                            train(training, text, arguments, bar)
                        except Exception:
                            traceback.print_exc()
                            failed.append(run.name)
                        tried = True
                        break  # another run may now be the longest that is ready
            if tried:
                continue
            if waiting and not busy:
                failed += waiting
            if not (waiting and busy):
                break
            time.sleep(1)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def process(text: str) -> tuple[int, int]:
    """I/N."""
    number, _, count = text.partition("/")
    if not 0 <= int(number) < int(count):
        raise ValueError
    return int(number), int(count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("plan", type=Path, metavar="RUNS.json")
    parser.add_argument("--only", nargs="+", metavar="NAME", help='groups or runs; "*" is any text')
    parser.add_argument("--list", action="store_true", help="print the runs and train none")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--process", type=process, default=(0, 1), metavar="I/N", help="on GPU I")
    parser.add_argument("--records", type=Path, default=Path("out/study/records.jsonl"))
    parser.add_argument(
        "--earlier", type=Path, nargs="+", default=[], help="records of sessions before this one"
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("out/study/checkpoints"))
    parser.add_argument("--compile", default="inductor", help='a backend, or "none"')
    arguments = parser.parse_args()
    runs, plan = read_plan(arguments.plan)
    names = arguments.only or ["*"]
    chosen = [r for r in runs if any(n == r.group or fnmatch.fnmatch(r.name, n) for n in names)]
    if not chosen:
        parser.error(f"--only {' '.join(names)}: no run or group of the plan has such a name")
    if arguments.list:
        for run in chosen:
            print(f"{run.predicted_s:7.0f} s  {run.name}")
        print(f"{sum(run.predicted_s for run in chosen) / 60:7.0f} minutes in all")
        return
    number, count = arguments.process
    gpu = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    arguments.device = torch.device(arguments.device or gpu)
    if arguments.device.type == "cuda":
        torch.cuda.set_device(arguments.device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    text = Text(Path(plan["data"]), plan["training"]["length"])
    work(chosen, runs, text, arguments)


if __name__ == "__main__":
    main()
