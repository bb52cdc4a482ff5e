"""Every script runs, tiny and on a CPU, and says by its exit code whether all rows are right.

The scripts below run one after the other in one process, which imports PyTorch once.
"""

import io
import json
import multiprocessing
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moda_ops.tools import cli

ROOT = Path(__file__).parents[1]
RUNS = {  # script: arguments of a tiny run; several scripts have tiny sizes of their own on a CPU
    "docs/measurements/plot_operator.py": "--output {folder}/h100_operator.svg",
    "tests/benchmarks/bounded_slots.py": "--layers 3 --steps 1 --seeds 1 --held-out 1 --budget 2 "
    "--depths 4",
    "tests/benchmarks/depth_mass.py": "",
    "tests/benchmarks/family.py": "",
    "tests/benchmarks/generate.py": "--batches 3 --modes eager --layers 1 --jobs 4",
    "tests/benchmarks/gradient_dtype.py": "--layers 2",
    "tests/benchmarks/stream_memory.py": "--layers 2 --modes block --backend eager "
    "--streams StackedSlots DepthStream",
    "tests/benchmarks/train_step.py": "--groups 2 --batches 1 fit --compile none --layers 2 "
    "--steps 2 --profile {folder}/profile.txt",
}
ELSEWHERE = {  # script: the test that runs it
    "docs/examples/train_parallel.py": "tests/test_distributed.py",
    "docs/examples/train_pipeline.py": "tests/test_distributed.py",
    "docs/study/plot.py": "tests/test_study.py",
    "docs/study/prepare_text.py": "tests/test_study.py",
    "docs/study/train.py": "tests/test_study.py",
    "tests/benchmarks/parallel_step.py": "tests/test_distributed.py",
    "tests/fuzz.py": "tests/test_fuzz.py",
    "tests/kernels/compile_for.py": "tests/kernels/test_other_gpus.py",
    "tests/kernels/every_kernel.py": "tests/kernels/test_other_gpus.py",
    "tests/mutate.py": "tests/test_mutate.py",
    "tutorials/execute.py": "tests/test_tutorials.py",
}


def run(script: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of ``python script arguments``."""
    code = 0
    with (
        redirect_stdout(io.StringIO()) as printed,
        redirect_stderr(printed),
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(sys, "path", sys.path.copy()),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            print(ended.code, file=printed)
        except Exception:
            code = 1
            traceback.print_exc()
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def process() -> Iterator[Callable[..., tuple[int, str]]]:
    """``run`` in the process of all scripts."""
    spawn = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict("os.environ", CUDA_VISIBLE_DEVICES=""),
        ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        yield lambda *arguments: pool.submit(run, *arguments).result()


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} in a record")


@pytest.mark.parametrize("script", RUNS)
def test_a_script_runs(script: str, process: Any, tmp_path: Path) -> None:
    arguments = RUNS[script].format(folder=tmp_path).split()
    record = tmp_path / "record.json"
    if "--json" in (ROOT / script).read_text():
        arguments += ["--json", str(record)]
    code, printed = process(script, *arguments)
    assert code == 0, printed
    assert not re.search(r"\b(failed|wrong|nan|Traceback)\b", printed), printed
    if "--json" in arguments:
        assert json.loads(record.read_text(), parse_constant=no_constant)["device"] == "cpu"
    if script == "docs/measurements/plot_operator.py":
        committed = (ROOT / script).with_name("h100_operator.svg").read_text()
        drawn = (tmp_path / "h100_operator.svg").read_text()
        texts = r"<!-- (.*) -->"  # of labels and numbers, which are drawn as paths
        assert re.findall(texts, drawn) == re.findall(texts, committed)


@pytest.mark.parametrize("name", ["generate", "stream_memory", "train_step"])
def test_a_script_stops_in_time(name: str, process: Any) -> None:
    code, printed = process(f"tests/benchmarks/{name}.py", "--seconds", "0")
    assert code == 0 and "\n0 seconds are over\n" in printed, printed


def test_a_process_that_fails_fails_the_script(process: Any) -> None:
    code, printed = process("tests/benchmarks/generate.py", "--prompts", "0", "--jobs", "1")
    assert code == 1 and "a process has failed, see above" in printed, printed


def test_no_script_is_forgotten() -> None:
    main = re.compile(r'^if __name__ == "__main__":', re.M)
    files = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in ("docs", "tests", "tutorials")
        for path in (ROOT / folder).rglob("*.py")
        if "_build" not in path.parts
    }
    scripts = {name for name, text in files.items() if main.search(text)}
    assert scripts == RUNS.keys() | ELSEWHERE.keys()
    for script, test in ELSEWHERE.items():
        assert Path(script).name in files[test]
    # What has no main is a test, or a part of a script.
    for name, text in files.items():
        stem = Path(name).stem
        folder = name.startswith(("docs/examples/", "docs/measurements/", "tests/benchmarks/"))
        if folder and name not in scripts and not stem.startswith("test_"):
            assert any(f"from {stem} import" in files[script] for script in scripts), name
            assert "def main" not in text


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = sorted((ROOT / "docs" / "measurements").glob("*.json"))
OPTIONS = r"((?: --[\w-]+(?: (?!--)[^\s`;,#$()]+)*)*)"


def commands(path: Path) -> list[tuple[str, str]]:
    """Commands that a page quotes: a script's name, or a command of moda-ops, and arguments."""
    text = " ".join(path.read_text().split())
    return re.findall(rf"(\w+\.py|\b(?:demo|digits|bench|doctor)\b){OPTIONS}", text)


def test_quoted_commands_have_their_options(process: Any) -> None:
    """A figure's command can be run today: the script is there and knows the options."""
    quoted: dict[str, set[str]] = {}
    for path in (*PAGES, *RECORDS):
        for name, arguments in commands(path):
            quoted.setdefault(name, set()).update(re.findall(r"--[\w-]+", arguments))
    scripts = {Path(name).name: name for name in (*RUNS, *ELSEWHERE)}
    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in cli.main.commands.items()
    }
    for name in quoted.keys() & scripts.keys():
        code, printed = process(scripts[name], "--help") if quoted[name] else (0, "")
        assert code == 0, printed
        known[name] = set(re.findall(r"^ +(?:-h, )?(--[\w-]+)", printed, re.M))
    assert len(quoted.keys() & scripts.keys()) > 8
    for name in quoted.keys() & known.keys():
        assert quoted[name] <= known[name], (name, quoted[name] - known[name])
    written = {name for name in quoted if name.endswith(".py")} - scripts.keys()
    files = {path.name for path in ROOT.rglob("*.py")}
    assert {name for name in written if quoted[name]} <= files


def test_a_failure_is_an_exit_code(process: Any, tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text("import sys\nexec(sys.argv[1])\n")
    for line, code in (("1 / 0", 1), ("sys.exit('wrong')", 1), ("sys.exit(3)", 3), ("", 0)):
        assert process(str(script), line)[0] == code
    with pytest.raises(AssertionError, match="NaN in a record"):
        json.loads("[NaN]", parse_constant=no_constant)
