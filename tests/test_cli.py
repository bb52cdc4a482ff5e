"""``moda-ops demo`` and ``moda-ops doctor`` as a user meets them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from moda_ops.nn import MoDAConfig, MoDALanguageModel, generate
from moda_ops.tools import cli, demo, doctor, selfcheck


def moda_ops(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def environment() -> dict[str, str]:
    """Subprocesses run eagerly: these tests are about files and exit codes, not about Inductor."""
    settings = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "soon"], "--seconds"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--device", "tpu"], "--device"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments: list[str], message: str) -> None:
    result = moda_ops("demo", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage:")
    assert message in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_gpu_is_a_usage_error() -> None:
    result = moda_ops("demo", "--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA device is available" in result.stderr


def test_output_folder_without_a_parent(tmp_path: Path) -> None:
    result = moda_ops("demo", "--output", str(tmp_path / "missing" / "demo"))
    assert result.exit_code == 1
    assert "cannot write to --output: [Errno 2] No such file or directory" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "missing").exists()


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "demo").touch()
    result = moda_ops("demo", "--output", str(tmp_path / "demo"))
    assert result.exit_code == 1
    assert "cannot write to --output: [Errno 17] File exists" in result.stderr


def test_output_folder_that_takes_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(demo.tempfile, "TemporaryFile", refuse)  # root may write everywhere
    result = moda_ops("demo", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert "cannot write to --output: [Errno 13] Permission denied" in result.stderr


def test_missing_extras_name_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    result = moda_ops("demo", "--device", "cpu", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert "moda-ops demo needs matplotlib and tqdm: pip install 'moda-ops[demo]'" in result.stderr


WITHOUT_TRITON = """
import runpy, sys

sys.modules["triton"] = None  # importing it raises ModuleNotFoundError
for command in ("bench --seconds 0.001 --output bench", "doctor", "demo --steps 2 --output demo"):
    sys.argv = ["moda_ops", *command.split()]
    try:
        runpy.run_module("moda_ops", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, command
assert "moda_kernels" not in sys.modules
"""


@pytest.fixture(scope="module")
def without_triton(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of ``python -m moda_ops bench``, ``doctor`` and two steps of ``demo``."""
    folder, paths = tmp_path_factory.mktemp("without_triton"), os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env=environment() | {"PYTHONPATH": paths},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def two_steps(without_triton: tuple[Path, str]) -> tuple[Path, str]:
    return without_triton[0] / "demo", without_triton[1]


def test_commands_run_without_triton(without_triton: tuple[Path, str]) -> None:
    folder, printed = without_triton
    assert (folder / "bench" / "bench.json").exists()
    assert "SDPA" in printed and "cpu float32       ok" in printed
    assert "failed" not in printed.lower()


def test_demo_writes_a_checkpoint_that_loads(two_steps: tuple[Path, str]) -> None:
    checkpoint = torch.load(two_steps[0] / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2
    assert 0 < checkpoint["bits_per_byte"] < 9
    model = MoDALanguageModel(MoDAConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])


def test_demo_writes_a_plot_and_a_sample(two_steps: tuple[Path, str]) -> None:
    output, _ = two_steps
    assert sorted(path.name for path in output.iterdir()) == sorted(demo.FILES)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    sample = (output / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith(demo.PROMPT.decode())
    assert len(sample) > 100


def test_the_sample_stays_within_the_context_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, lengths = MoDALanguageModel(demo.RECIPES["cpu"].model), list[int]()

    def spy(model: Any, prompts: list[list[int]], new: int, **options: Any) -> list[torch.Tensor]:
        lengths.append(len(prompts[0]) + new)
        return generate(model, prompts, new, **options)

    monkeypatch.setattr(demo, "generate", spy)
    text = demo.sample(model, 16, length=30, seed=3)
    assert text.startswith(demo.PROMPT) and len(text) == len(demo.PROMPT) + 30
    assert lengths == [16, 16, 16, 10]
    assert demo.sample(model, 16, length=30, seed=3) == text != demo.sample(model, 16, 30, seed=4)


def test_demo_checks_the_operator(two_steps: tuple[Path, str]) -> None:
    _, printed = two_steps
    assert "operator against moda_reference (float64)" in printed
    assert "all within tolerance" in printed


def test_demo_fails_if_the_operator_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = selfcheck.moda_attention

    def wrong(*tensors: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*tensors, **options)
        return out * (1 + 1e-5), lse

    monkeypatch.setattr(selfcheck, "moda_attention", wrong)
    model = MoDALanguageModel(demo.RECIPES["cpu"].model)
    assert not demo.check(model, torch.arange(32)[None])
    assert "FAILED" in capsys.readouterr().out


def test_interrupt_keeps_the_checkpoint(tmp_path: Path) -> None:
    # A shell's background jobs ignore SIGINT, and their children inherit that.
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from moda_ops.tools.cli import main; main()"
    )
    command = [sys.executable, "-c", start, "demo", "--seconds", "600", "--output", str(tmp_path)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(2)  # some steps
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    kept = [str(tmp_path / name) for name in ("checkpoint.pt", "loss.png")]
    assert f"Interrupted. Kept: {', '.join(kept)}." in printed
    assert "Traceback" not in printed
    assert "model" in torch.load(kept[0], weights_only=True)


def test_checkpoint_is_replaced_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, path = MoDALanguageModel(demo.RECIPES["cpu"].model), tmp_path / "checkpoint.pt"
    demo.save(model, 1, 5.0, path)

    def die(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        demo.save(model, 2, 4.0, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_held_out_text_is_not_trained_on() -> None:
    training, held_out = demo.read_corpus()
    window = bytes(held_out[10_000:10_200].tolist())
    assert window not in bytes(training.numpy())
    assert len(training) > 10 * len(held_out) > 10**6


def test_doctor_passes_and_names_everything() -> None:
    result = moda_ops("doctor")
    assert result.exit_code == 0, result.output
    for word in ("python", "moda-ops", "torch", "triton", "numpy", "plain PyTorch"):
        assert word in result.stdout
    assert f"torch             {torch.__version__}" in result.stdout
    assert "cpu float32       ok" in result.stdout


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for module in (cli, doctor):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "triton" else name)
    for command in ("demo", "digits", "bench"):
        for arguments in ([], ["--device", "cuda"]):
            result = moda_ops(command, *arguments)
            assert result.exit_code == 2
            assert "a CUDA device needs Triton, which is not installed" in result.stderr
    result = moda_ops("doctor")
    expected = "none on NVIDIA X1: the kernels need Triton, which is not installed"
    assert f"cuda tensors      {expected}\n" in result.stdout


def test_doctor_says_why_a_shape_gets_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from moda_kernels import sdpa

    monkeypatch.setattr(sdpa, "select", lambda *tensors: "cudnn")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    rows = dict(doctor.plans(torch.device("cpu"), torch.bfloat16))
    fused = "fused (too little arithmetic for a library to gain)"
    assert rows["T=2048 G=2 L=47 D=64"] == f"9 GFLOP: forward {fused}, backward {fused}"
    split = "split (cudnn covers it)"
    assert rows["T=4096 G=8 L=64 D=64"] == f"137 GFLOP: forward {fused}, backward {split}"


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_doctor_fails_if_the_operator_does(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor) -> list[selfcheck.Error]:
        if fault == "raises":
            raise RuntimeError("no kernel image\nlong story")
        return [selfcheck.Error("out", np.nan, 1e-6)]

    monkeypatch.setattr(doctor, "operator_errors", broken)
    result = moda_ops("doctor")
    assert result.exit_code == 1
    expected = {"wrong": "FAILED: relative error of out nan", "raises": "FAILED: RuntimeError: no"}
    assert expected[fault] in result.stdout
    assert "long story" not in result.stdout


def test_self_check_sees_a_small_relative_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v, key, value = torch.randn(5, 1, 40, 2, 16).unbind()
    inputs = (3 * q, 3 * k, v, [3 * key], [value])  # scores up to about 100
    assert all(error.ok for error in selfcheck.operator_errors(*inputs))

    right = selfcheck._operator
    monkeypatch.setattr(selfcheck, "_operator", lambda *x: tuple(y * (1 + 5e-5) for y in right(*x)))
    assert not any(error.ok for error in selfcheck.operator_errors(*inputs))


def test_commands_are_described() -> None:
    result = moda_ops("--help")
    assert result.exit_code == 0
    assert isinstance(cli.main, click.Group)
    assert sorted(cli.main.commands) == ["bench", "demo", "digits", "doctor"]
    assert all(name in result.stdout for name in cli.main.commands)
