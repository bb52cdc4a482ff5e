"""What nbval needs around the notebooks; their cells are the tests."""

import os
from functools import cache
from pathlib import Path

import pytest

collect_ignore = ["execute.py"]

ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        *(str(ROOT / name) for name in ("", "kernels", "reference")),
        os.environ.get("PYTHONPATH", ""),
    ]
)


@cache
def find_fonts() -> None:
    """On a new machine matplotlib says that it looks for fonts: not in a cell."""
    import matplotlib.font_manager  # noqa: F401


def pytest_runtest_setup(item: pytest.Item) -> None:
    find_fonts()
