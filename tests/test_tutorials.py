"""The notebooks as documents: complete, executed, diffable. In `make test` nbval runs the cells."""

import importlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext", reason="comes with the test extra")
nbformat = pytest.importorskip("nbformat", reason="comes with the test extra")
from jupytext.combine import combine_inputs_with_outputs  # noqa: E402

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECTIONS = ("Question", "Derivation", "Check", "Picture", "Cost", "Exercises", "Read next")
MARKERS = re.compile(r"NBVAL_|nbval-|raises-exception|PYTEST_VALIDATE")

Notebook = Any
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Notebook) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def sections(notebook: Notebook) -> dict[str, list[Any]]:
    """Cells by second-level heading, without what a colon adds to it ("Check: the merge")."""
    found: dict[str, list[Any]] = {}
    name = ""
    for cell in notebook.cells:
        heading = re.match(r"## ([^:\n]+)", cell.source) if cell.cell_type == "markdown" else None
        name = heading[1].strip() if heading else name
        found.setdefault(name, []).append(cell)
    return found


def is_hidden(cell: Any) -> bool:
    """Folded in the documentation and in Jupyter until the reader opens it."""
    if cell.cell_type == "markdown":
        return cell.source.startswith("<details>") and cell.source.rstrip().endswith("</details>")
    hidden = cell.metadata.get("jupyter", {})
    return "hide-cell" in cell.metadata.get("tags", []) and all(
        hidden.get(name) is True for name in ("source_hidden", "outputs_hidden")
    )


def has_picture(cell: Any) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def unexplained_markers(cell: Any) -> list[str]:
    """Lines and tags that keep nbval from comparing outputs, and say no reason."""
    marked = [tag for tag in cell.metadata.get("tags", []) if MARKERS.search(tag)]
    lines = cell.source.splitlines()
    for number, line in enumerate(lines):
        reason = lines[number - 1] if number else ""
        if MARKERS.search(line) and not reason.lstrip().startswith("# "):
            marked.append(line)
    return marked


def test_there_are_notebooks() -> None:
    numbers = [path.name[:2] for path in NOTEBOOKS]
    assert numbers == [f"{number:02}" for number in range(1, len(NOTEBOOKS) + 1)]
    index = (FOLDER / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"({path.name})" not in index] == []


@every_notebook
def test_committed_as_executed(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = json.dumps(outputs)
    assert not re.findall(r"/(?:home|root|work|tmp|usr)/[^\"]*|site-packages", text)
    assert not re.findall(r"object at 0x[0-9a-f]+", text)


@every_notebook
def test_nothing_volatile(path: Path) -> None:
    execute = runpy.run_path(str(FOLDER / "execute.py"))
    notebook = read(path)
    assert notebook.metadata.language_info.pygments_lexer == "ipython3"
    assert nbformat.writes(execute["normalise"](notebook)) + "\n" == path.read_text()


@every_notebook
def test_survives_the_round_trip_through_a_script(path: Path) -> None:
    execute = runpy.run_path(str(FOLDER / "execute.py"))
    notebook = read(path)
    script = jupytext.writes(notebook, fmt="py:percent")
    again = combine_inputs_with_outputs(jupytext.reads(script, fmt="py:percent"), notebook)
    assert [cell.source for cell in again.cells] == [cell.source for cell in notebook.cells]
    assert nbformat.writes(execute["normalise"](again)) + "\n" == path.read_text()


@every_notebook
def test_every_part_is_there(path: Path) -> None:
    notebook = read(path)
    assert re.match(rf"# {path.name[:2]}\. ", notebook.cells[0].source)
    parts = sections(notebook)
    assert [name for name in SECTIONS if name not in parts] == []
    assert next(name for name in parts if name) == "Question"
    assert list(parts)[-2:] == ["Exercises", "Read next"]
    assert not any(cell.cell_type == "code" for cell in parts[""])  # the question comes first

    check = "\n".join(c.source for c in parts["Check"] if c.cell_type == "code")
    assert "moda_reference" in check and re.search(r"^ *assert|assert_", check, re.M)
    assert any(map(has_picture, parts["Picture"]))
    assert any(cell.get("outputs") for cell in parts["Cost"])


@every_notebook
def test_three_exercises_with_hidden_solutions(path: Path) -> None:
    cells = sections(read(path))["Exercises"]
    starts = [i for i, cell in enumerate(cells) if cell.source.startswith("### Exercise ")]
    assert [cells[i].source.split()[2].strip(".:") for i in starts] == ["1", "2", "3"]
    for start, end in zip(starts, [*starts[1:], len(cells)], strict=True):
        question, *solution = cells[start:end]
        assert question.cell_type == "markdown" and "<details>" not in question.source
        assert solution and all(map(is_hidden, solution))
        for cell in solution:
            if cell.cell_type == "code":
                assert re.search(r"assert|\bcheck\(", cell.source), cell.source


@every_notebook
def test_no_cell_is_ignored_without_a_reason(path: Path) -> None:
    assert [line for cell in read(path).cells for line in unexplained_markers(cell)] == []


def test_what_counts_as_a_reason() -> None:
    def cell(source: str, **metadata: Any) -> Any:
        return nbformat.v4.new_code_cell(source, metadata=metadata)

    assert unexplained_markers(cell("# NBVAL_IGNORE_OUTPUT\n1")) == ["# NBVAL_IGNORE_OUTPUT"]
    assert unexplained_markers(cell("# says when it ran\n# NBVAL_IGNORE_OUTPUT\n1")) == []
    assert unexplained_markers(cell("1", tags=["nbval-skip"])) == ["nbval-skip"]
    assert unexplained_markers(cell("1", tags=["hide-cell"])) == []


def test_figures_are_recorded_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "FOLDER", tmp_path / "measurements")
    monkeypatch.delenv("MODA_RECORD", raising=False)
    measure.record("03_x", lambda: pytest.fail("measured without being asked"))
    assert measure.recorded("03_x") == []
    monkeypatch.setenv("MODA_RECORD", "1")
    measure.record("03_x", lambda: {"ms": 1.5})
    (figures,) = measure.recorded("03_x")
    assert figures["ms"] == 1.5 and figures["command"] == "MODA_RECORD=1 python 03_x.py"
    assert {"device", "torch", "python"} <= set(figures)
    assert measure.recorded("03") == []  # of this notebook alone
    figures = dict(device="X1", torch="9", triton="8", command="c")
    assert measure.origin(figures) == "X1, torch 9, triton 8, c"
    del figures["triton"]
    assert measure.origin(figures) == "X1, torch 9, c"


def test_only_marked_numbers_are_not_compared() -> None:
    patterns = re.findall(
        r"^regex: (.*)$\n^replace: (.*)$", (FOLDER / "sanitize.cfg").read_text(), re.M
    )

    def sanitized(text: str) -> str:
        for regex, replacement in patterns:
            text = re.sub(regex, replacement, text)
        return text

    assert sanitized("took   ~1,234.5 ms of 12 ms") == sanitized("took ~7 ms of 12 ms")
    assert sanitized("by ~-0.5 bits") == sanitized("by   ~0.04 bits")
    assert sanitized("took ~7 ms of 12 ms") != sanitized("took ~7 ms of 13 ms")
    assert sanitized("device: CPU\n3") == sanitized("device: NVIDIA H100\n3")


def test_a_notebook_is_executed_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As ``make tutorials`` does it."""
    monkeypatch.setenv("PYTHONPATH", "")  # what main sets is for its kernels
    path, v4 = tmp_path / "note.ipynb", nbformat.v4
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("import moda_reference; 6 * 7")]), path)
    runpy.run_path(str(FOLDER / "execute.py"))["main"]([path])
    (cell,) = read(path).cells
    assert cell.execution_count == 1 and cell.outputs[0].data == {"text/plain": "42"}
