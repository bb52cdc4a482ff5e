"""The scripts of docs/study at toy size: text, training, interruption, figures; and the plan."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from moda_ops.nn import MoDALanguageModel
from moda_ops.policies import kept_slots, most_mass
from test_scripts import ROOT, run

STUDY = ROOT / "docs" / "study"
sys.path.append(str(STUDY))

from study_plan import missing, model_config, read_plan  # noqa: E402
from study_text import Text  # noqa: E402

LENGTH, BATCH = 16, 2
TRAINING = dict(
    batch=BATCH, length=LENGTH, warm_up=0.1, last_lr=0.1, weight_decay=0.1, betas=[0.9, 0.95],
    clip=1.0, evaluate_every=2, held_out_windows=8,
)  # fmt: skip
SIZES = dict(vocab_size=512, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64, layers=3)
MODELS = dict(
    residual=dict(depth="residual", norm="pre", tokens_per_s=1000),
    moda=dict(depth="kv+ffn", norm="post", tokens_per_s=500),
    bounded=dict(depth="kv+ffn", norm="post", budget=2, policy="recent", tokens_per_s=700),
    chosen=dict(
        depth="kv+ffn",
        norm="post",
        budget=2,
        policy="most mass of",
        mass_from="main-moda-seed0",
        tokens_per_s=700,
    ),
)
GROUPS = dict(
    sweep=dict(models=["residual", "moda"], tokens=2 * BATCH * LENGTH, lr=[1e-3, 1e-2], seeds=[0]),
    main=dict(
        models=["residual", "moda"], tokens=5 * BATCH * LENGTH, lr={"from": "sweep"}, seeds=[0, 1]
    ),
    rest=dict(models=["bounded", "chosen"], tokens=2 * BATCH * LENGTH, lr=[1e-3], seeds=[0]),
    lost=dict(models=["residual"], tokens=6 * BATCH * LENGTH, lr=[1e30], seeds=[0]),
)  # fmt: skip
TIMES = {"device_s", "tokens_per_s", "peak_gib", "machine"}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of a few files of this repository, made by the script."""
    folder = tmp_path_factory.mktemp("text")
    source = folder / "source"
    (source / "nn").mkdir(parents=True)
    operators = ROOT / "moda_ops" / "operators"
    for path in sorted(operators.glob("c*.py")) + sorted((ROOT / "docs").glob("m*.md")):
        (source / "nn" / path.name).write_bytes(path.read_bytes())
    (source / "copy.py").write_bytes((operators / "checks.py").read_bytes())
    (source / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    (source / "picture.py").write_bytes(b"\xff\0")
    prepare(source, folder / "text.bin")
    return folder / "text.bin"


def prepare(source: Path, output: Path) -> None:
    arguments = f"{source} --output {output} --vocabulary 512 --held-out 0.3 --suffixes .py .md"
    code, printed = run("docs/study/prepare_text.py", *arguments.split(), "--sources", "moda 0.1")
    assert code == 0, printed


def train(folder: Path, text_file: Path, *arguments: str) -> tuple[int, str]:
    plan = dict(
        data=str(text_file), start_s=1, sizes=SIZES, training=TRAINING, models=MODELS, groups=GROUPS
    )
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(plan))
    options = f"{folder}/runs.json --records {folder}/records.jsonl --checkpoints {folder}/kept"
    return run("docs/study/train.py", *options.split(), "--device", "cpu", *arguments)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_text_is_split_by_file_and_the_same_every_time(text_file: Path, tmp_path: Path) -> None:
    about = json.loads(Path(f"{text_file}.json").read_text())
    tokens = np.fromfile(text_file, "<u2")
    tokenizer = Tokenizer.from_file(f"{text_file}.tokenizer.json")
    held_out = tokens[about["held_out_from"] :]
    files = [tokenizer.decode(part[:-1]) for part in np.split(held_out, 1 + np.flatnonzero(
        held_out == 0))[:-1]]  # fmt: skip
    names = [file["name"] for file in about["held_out_files"]]
    assert files == [(text_file.parent / name).read_text() for name in names]
    first = {file["start"]: file["kind"] for file in about["held_out_files"]}
    assert [first[about["held_out_from"]], set(first.values())] == [
        Path(names[0]).suffix, {Path(name).suffix for name in names}
    ]  # fmt: skip
    assert about["vocabulary"] == 512 and about["licences"] == ["source/LICENSE"]
    parts = about["training"], about["held_out"]
    assert sum(part["tokens"] for part in parts) == len(tokens)
    written = {p.read_bytes() for p in text_file.parent.glob("source/**/*.[pm]*")} - {b"\xff\0"}
    assert sum(part["files"] for part in parts) == len(written)  # the copy is not there twice
    assert sum(part["bytes"] for part in parts) == sum(map(len, written))
    prepare(text_file.parent / "source", tmp_path / "again")
    for end in ("", ".json", ".tokenizer.json"):
        assert Path(f"{text_file}{end}").read_bytes() == (tmp_path / f"again{end}").read_bytes()


def test_every_pass_reads_every_window_once(text_file: Path) -> None:
    text = Text(text_file, LENGTH)
    whole = text.windows
    rows = torch.cat([text.batch(seed=1, step=step, size=1) for step in range(2 * whole)])
    expected = torch.from_numpy(text.tokens[: whole * LENGTH].astype(np.int64)).view(-1, LENGTH)
    for part in rows[:, :LENGTH].split(whole):
        assert sorted(part.tolist()) == sorted(expected.tolist())
    assert not torch.equal(rows[:whole], rows[whole:])
    assert torch.equal(text.batch(1, 1, whole - 1), rows[whole - 1 : 2 * whole - 2])
    assert not torch.equal(text.batch(2, 0, whole), rows[:whole])
    windows, kinds = text.held_out(8)
    starts = np.linspace(text.held_out_from, len(text.tokens) - LENGTH - 1, 8).astype(int)
    for start, window, kind in zip(starts, windows, kinds, strict=True):
        assert window.tolist() == text.tokens[start : start + LENGTH + 1].tolist()
        file = [f for f in text.about["held_out_files"] if f["start"] <= start + LENGTH][-1]
        assert text.kinds[kind[-1]] == file["kind"]


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    code, printed = train(folder, text_file, "--compile", "none")
    assert code == 0, printed
    return folder


def test_records_of_a_plan(trained: Path) -> None:
    found = records(trained)
    ends = {record["run"]: record for record in found if record["what"] == "end"}
    assert set(ends) == {
        *(f"sweep-{m}-lr{lr}-seed0" for m in ("moda", "residual") for lr in ("0.001", "0.01")),
        *(f"main-{m}-seed{seed}" for m in ("moda", "residual") for seed in (0, 1)),
        "lost-residual-lr1e+30-seed0",
        *(f"rest-{m}-lr0.001-seed0" for m in ("bounded", "chosen")),
    }
    for model in ("moda", "residual"):
        sweep = [end for end in ends.values() if (end["group"], end["model"]) == ("sweep", model)]
        best = min(sweep, key=lambda end: end["held_out_loss"])["lr"]
        assert {ends[f"main-{model}-seed{seed}"]["lr"] for seed in (0, 1)} == {best}
        steps = [r["step"] for r in found if r["run"] == f"main-{model}-seed0" and "step" in r]
        assert steps == [2, 4, 5]
    lost = ends["lost-residual-lr1e+30-seed0"]  # stops when the loss is no number
    assert lost["held_out_loss"] is None and lost["trained_tokens"] < lost["tokens"]
    end = ends["main-moda-seed0"]
    assert end["trained_tokens"] == 5 * BATCH * LENGTH and end["tokens_per_s"] > 0
    assert len(end["depth_mass"][2]) == 4 and ends["main-residual-seed0"]["depth_slots"][2] == []
    assert np.mean(end["loss_by_position"]) == pytest.approx(end["held_out_loss"])
    config = model_config(SIZES | MODELS["chosen"], found)
    assert config.depth_keep == kept_slots([0, 2, 2], 2, most_mass(end["depth_mass"]))
    assert [list(keep) for keep in config.depth_keep] == ends["rest-chosen-lr0.001-seed0"][
        "depth_keep"
    ]
    kinds = end["loss_by_kind"].values()
    total = sum(kind["loss"] * kind["tokens"] for kind in kinds)
    assert total / (8 * LENGTH) == pytest.approx(end["held_out_loss"])
    assert not list((trained / "kept").glob("*.pt"))


def test_an_interrupted_run_gives_the_same_records(
    trained: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        text_file, "--only", "main-moda-seed1", "--compile", "none",
        "--earlier", str(trained / "sweep.jsonl"),
    )  # fmt: skip
    whole = records(trained)
    lines = [json.dumps(record) for record in whole if record["run"].startswith("sweep")]
    (trained / "sweep.jsonl").write_text("\n".join(lines))
    batch = Text.batch

    def stops_at_step_3(self: Text, seed: int, step: int, size: int) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, seed, step, size)

    def stops_after_a_record(*_: Any) -> None:
        raise KeyboardInterrupt

    for place, name, stops in (
        (Text, "batch", stops_at_step_3),
        (torch, "save", stops_after_a_record),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stops)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path, *arguments)
    assert [record["step"] for record in records(tmp_path)] == [2, 4]
    for _ in range(2):  # the second time there is nothing to do
        code, printed = train(tmp_path, *arguments)
        assert code == 0, printed
    changed = json.loads((tmp_path / "runs.json").read_text())
    changed["training"]["clip"] = 2.0
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    options = f"{tmp_path}/changed.json --only main-moda-seed1 --records {tmp_path}/records.jsonl"
    options += f" --checkpoints {tmp_path}/kept"
    code, printed = run("docs/study/train.py", *options.split(), "--device", "cpu")
    assert code == 1 and "main-moda-seed1 is recorded with other settings: training" in printed
    expected = [record for record in whole if record["run"] == "main-moda-seed1"]

    def same(record: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in record.items() if name not in TIMES}

    assert list(map(same, records(tmp_path))) == list(map(same, expected))


def test_what_stops_a_plan(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = train(tmp_path, text_file, "--only", "main")
    assert code == 1 and "main-moda-seed0 (needs sweep-moda-lr0.001-seed0, " in printed
    code, printed = train(tmp_path, text_file, "--only", "nothing")
    assert code == 2 and "no run or group of the plan has such a name" in printed
    code, printed = train(tmp_path, text_file, "--only", "sweep", "--seconds", "0.5")
    assert code == 0 and "no time for sweep-moda-lr0.001-seed0, " in printed, printed
    with monkeypatch.context() as patch:
        patch.setattr(Text, "batch", lambda *_: 1 / 0)
        code, printed = train(tmp_path, text_file, "--only", "sweep*", "--compile", "none")
    assert code == 1 and printed.count("ZeroDivisionError") == 4, printed
    assert "failed: sweep-moda-lr0.001-seed0, sweep-moda-lr0.01-seed0, " in printed
    code, printed = train(tmp_path, text_file, "--list")
    assert code == 0 and "      1 s  sweep-moda-lr0.001-seed0" in printed


def test_a_run_is_claimed_by_one_process_at_a_time(tmp_path: Path) -> None:
    claim = runpy.run_path(str(STUDY / "train.py"))["claim"]
    a, b = tmp_path / "a.lock", tmp_path / "b.lock"
    with claim(a) as mine, claim(a) as other, claim(b) as free:
        assert (mine, other, free) == (True, False, True)
    with claim(a) as mine:
        assert mine


@pytest.mark.filterwarnings("ignore")
def test_blocks_compile(text_file: Path, tmp_path: Path) -> None:
    code, printed = train(tmp_path, text_file, "--only", "rest-bounded*", "--compile", "eager")
    assert code == 0, printed
    assert [record["what"] for record in records(tmp_path)] == ["evaluation", "end"]


def test_figures_and_tables(trained: Path, tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        arguments = str(trained / "records.jsonl"), "--output", str(folder)
        code, printed = run("docs/study/plot.py", *arguments)
        assert code == 0, printed
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    names = {"curves.svg", "learning_rate.svg", "position.svg", "depth_mass.svg", "tables.md"}
    assert set(written[0]) == names
    assert "| lost | residual | 1 | 1 | none | none |" in written[0]["tables.md"].decode()
    losses = {r["run"]: r["held_out_loss"] for r in records(trained) if r["what"] == "end"}
    a, b = (losses[f"main-moda-seed{s}"] - losses[f"main-residual-seed{s}"] for s in (0, 1))
    half = 12.7062 * abs(a - b) / 2  # t of one degree of freedom; the deviation over sqrt(2)
    low, high = (a + b) / 2 - half, (a + b) / 2 + half
    row = f"| main | moda - residual | 2 | {(a + b) / 2:.4f} | {low:.4f} to {high:.4f} |"
    assert row in written[0]["tables.md"].decode()


def test_the_plan_is_as_large_as_it_says() -> None:
    runs, plan = read_plan(STUDY / "runs.json")
    assert len({run.name for run in runs}) == len(runs)
    minutes = dict.fromkeys(plan["groups"], 0.0)
    for run_ in runs:
        minutes[run_.group] += run_.predicted_s / 60
    found = {group: round(value) for group, value in minutes.items()}
    assert plan["predicted_minutes"] == found | {"all": sum(found.values())}
    configs = {
        name: model_config(plan["sizes"] | options)
        for name, options in plan["models"].items()
        if "mass_from" not in options
    }
    for norm in ("post", "pre"):
        with torch.device("meta"):
            ours, wider = (
                MoDALanguageModel(configs[f"24-{name}-{norm}"]).num_parameters()
                for name in ("kv+ffn", "wider")
            )
        assert abs(wider / ours - 1) < 0.001
    assert max(configs["24-recent-8-post"].depth_reads()) == 8
    names = {run_.name for run_ in runs}
    for run_ in runs:
        needed = missing(run_, runs, [])
        assert set(needed) <= names and len(needed) == {"sweep": 0}.get(run_.group, len(needed))
        assert (run_.lr is None) == any(name.startswith("sweep") for name in needed)
        assert run_.tokens == run_.steps * 64 * 1024
