"""The package as a whole: what it imports, its examples and its glossary."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import moda_reference
from moda_reference.glossary import GLOSSARY, table

SOURCE_ROOT = Path(moda_reference.__file__).parents[1]
MODULES = [
    "moda_reference",
    *(f"moda_reference.{module.name}" for module in pkgutil.iter_modules(moda_reference.__path__)),
]


def run_python(*arguments: str) -> str:
    """What a fresh interpreter prints that finds the package by its source root alone."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={"PYTHONPATH": str(SOURCE_ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def packages_loaded_by(modules: list[str]) -> set[str]:
    """Top-level packages outside the standard library that importing `modules` loads."""
    program = (
        "import importlib, sys\n"
        "before = set(sys.modules)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*(loaded - sys.stdlib_module_names))\n"
    )
    return set(run_python("-c", program).split())


def test_imports_numpy_and_nothing_else():
    assert packages_loaded_by(["moda_reference"]) == {"moda_reference", "numpy"}
    assert packages_loaded_by(MODULES) == {"moda_reference", "numpy"}


def test_the_import_test_can_fail():
    assert "pytest" in packages_loaded_by(["moda_reference", "pytest"])


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", moda_reference.__all__)
def test_public_names_are_documented_and_functions_have_examples(name):
    member = getattr(moda_reference, name)
    assert inspect.getdoc(member)
    assert inspect.isclass(member) or ">>>" in inspect.getdoc(member)


def test_glossary_has_every_argument_and_result():
    symbols = [row.symbol for row in GLOSSARY]
    assert len(symbols) == len(set(symbols))
    arguments = {
        argument
        for name in moda_reference.__all__
        for argument in inspect.signature(getattr(moda_reference, name)).parameters
    }
    assert arguments | {"B", "HQ", "H", "G", "D", "DV", "L", "out", "lse"} <= set(symbols)


def test_glossary_prints_as_an_aligned_table():
    printed = run_python("-m", "moda_reference.glossary")
    assert printed == table() + "\n"
    header, *rows = printed.splitlines()
    start = header.index("meaning")
    assert len(rows) == len(GLOSSARY)
    for row, entry in zip(rows, GLOSSARY, strict=True):
        assert row.startswith(entry.symbol)
        assert row[start:].startswith(entry.meaning)
