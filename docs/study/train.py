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
import math
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
from study_training import Training, train  # noqa: E402


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


def attempt(
    run: Run,
    runs: list[Run],
    known: list[Record],
    text: Text,
    arguments: argparse.Namespace,
    bar: Any,
) -> bool:
    """Train the run; whether nothing failed, else the error is printed."""
    try:
        settings = run.settings(best_lr(run, runs, known), text.hash)
        config = model_config(run.options, known)
        training = Training(run, config, settings, arguments.device, arguments.compile)
        train(training, text, arguments.records, arguments.checkpoints, bar)
    except Exception:
        traceback.print_exc()
        return False
    return True


def work(chosen: list[Run], runs: list[Run], text: Text, arguments: argparse.Namespace) -> None:
    """Train what is left of the chosen runs, the longest first, until nothing is left."""
    from tqdm import tqdm

    def records() -> list[Record]:
        return read_records([arguments.records, *arguments.earlier])

    start, failed = time.monotonic(), list[str]()
    longest_first = sorted(chosen, key=lambda run: run.predicted_s, reverse=True)
    with tqdm(unit=" tokens", unit_scale=True, position=arguments.process[0], disable=None) as bar:
        while True:
            left = arguments.seconds - (time.monotonic() - start)
            busy, waiting, late, tried = [], [], [], False
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
                    elif run.predicted_s > left:
                        late.append(run.name)
                    elif needed := missing(run, runs, known):
                        waiting.append(f"{run.name} (needs {', '.join(needed)})")
                    else:
                        if not attempt(run, runs, known, text, arguments, bar):
                            failed.append(run.name)
                        tried = True
                        break  # another run may now be the longest that is ready
            if tried:
                continue
            if waiting and not (busy or late):
                failed += waiting
            if not (waiting and busy):
                break
            time.sleep(1)
    if late:
        print(f"no time for {', '.join(late + waiting)}")
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
        "--earlier", type=Path, nargs="+", default=[], help="more records, read but not written"
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("out/study/checkpoints"))
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="start no run that is predicted to end later",
    )
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
