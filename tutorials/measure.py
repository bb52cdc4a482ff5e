"""How the notebooks measure, and where figures of other machines are kept."""

import json
import logging
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# With a CUDA build beside nvcc but no GPU, the import says that CUDA_HOME is of no use.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils.benchmark import Timer  # noqa: E402

FOLDER = Path(__file__).parent / "measurements"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Of what `milliseconds` measures."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.+)", text)
    return f"{found[1] if found else platform.machine()}, 1 thread"


def milliseconds(call: Callable[[], Any], seconds: float = 0.3) -> float:
    """The median time of a call, on the GPU or on one thread of the CPU."""
    timer = Timer("call()", globals={"call": call})
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def record(notebook: str, measure: Callable[[], dict[str, Any]]) -> None:
    """Measure and write the figures to measurements/, where MODA_RECORD is set.

    `MODA_RECORD=1 python NOTEBOOK.py` does so, with the notebook as a script beside it.
    """
    if "MODA_RECORD" not in os.environ:
        return
    figures = dict(
        device=device_name(),
        torch=torch.__version__,
        python=platform.python_version(),
        command=f"MODA_RECORD=1 python {notebook}.py",
        **measure(),
    )
    if torch.cuda.is_available():
        import triton

        figures["triton"] = triton.__version__
    FOLDER.mkdir(exist_ok=True)
    name = re.sub(r"\W+", "_", figures["device"]).strip("_").lower()
    text = json.dumps(figures, indent=1) + "\n"
    (FOLDER / f"{notebook}-{name}.json").write_text(text)


def recorded(notebook: str) -> list[dict[str, Any]]:
    """What was recorded for a notebook, one entry a machine."""
    paths = sorted(FOLDER.glob(f"{notebook}-*.json"))
    return [json.loads(path.read_text()) for path in paths]


def origin(figures: dict[str, Any]) -> str:
    """Of recorded figures: device, versions and command."""
    versions = [f"{x} {figures[x]}" for x in ("torch", "triton") if x in figures]
    return ", ".join([figures["device"], *versions, figures["command"]])
