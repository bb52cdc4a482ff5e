"""The mutations of mutate.py fit the code as it is, and a run of them tells which are caught."""

import shlex
from pathlib import Path

import pytest

import mutate
from mutate import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.old}")
def test_a_mutation_applies(mutation: Mutation) -> None:
    assert mutate.applies(mutation), "the old text must occur in the file, and once"
    assert mutation.old != mutation.new
    named = [word for word in shlex.split(mutation.tests) if word.endswith(".py")]
    assert named and all((ROOT / name).exists() for name in named)


def test_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # pytest starts in half the time
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "test_code.py").write_text("import code as c\n\ndef test(): assert c.x > 0\n")
    for new, tests, expected in (
        ("x = 0", "test_code.py", "caught"),
        ("x = 2", "test_code.py", "NOT CAUGHT"),
        ("x =", "test_code.py", "DOES NOT RUN"),
        ("x = 0", "test_other.py", "FAILS ANYWAY"),
    ):
        mutation = Mutation("code.py", "x = 1", new, tests)
        assert mutate.outcome(mutation, tmp_path) == expected
    assert mutate.outcome(Mutation("code.py", "y", "z", ""), tmp_path) == "DOES NOT APPLY"
    assert (tmp_path / "code.py").read_text() == "x = 1\n"
