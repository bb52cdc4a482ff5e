"""What the distributions carry, that versions agree, and that README and reference say what is."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import moda_ops

ROOT = Path(__file__).parent.parent
ROOTS = [ROOT, ROOT / "kernels", ROOT / "reference"]
PACKAGES = ["moda_kernels", "moda_ops", "moda_reference"]


def build(kind: str, source: Path, destination: Path) -> Path:
    """Build an "sdist" or a "wheel" of source with the installed setuptools, without a network."""
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(destination)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = destination.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of the wheel that is built from the sdist of a copy of the tree."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("moda_ops", "kernels", "reference"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    with tarfile.open(build("sdist", tree, folder)) as sdist:
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        sdist.extractall(folder)
    (unpacked,) = folder.glob("moda_ops-*/")
    return zipfile.ZipFile(build("wheel", unpacked, folder)).namelist()


def test_wheel_has_the_three_packages_and_nothing_else(wheel_names: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert sorted(name for name in top if not name.endswith(".dist-info")) == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_has_every_module_and_its_types(package: str, wheel_names: list[str]) -> None:
    folder = next(root / package for root in ROOTS if (root / package).exists())
    sources = {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}
    assert sources <= set(wheel_names)
    assert f"{package}/py.typed" in wheel_names


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert moda_ops.__version__ == project["version"] == version("moda-ops")


def test_readme_examples_run() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(code), names)
    assert names["stream"].written == names["L"]
    assert names["out"].shape == (1, 128, 8, 64)
    assert names["q"].grad.isfinite().all()


def test_the_reference_lists_every_operator() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = " ".join(page.split()).replace("'auto'", '"auto"')
    schemas = [str(schema) for schema in torch._C._jit_get_all_schemas()]
    schemas = [schema for schema in schemas if schema.startswith("moda::")]
    assert len(schemas) >= 14
    assert [schema for schema in schemas if schema not in listed] == []
