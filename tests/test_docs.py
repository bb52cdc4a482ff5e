"""The code on every page of docs/ runs as a reader would run it.

The python blocks of a section run one after the other, and a section by itself. Of pages with
sessions (pycon blocks) all run in one doctest.
"""

import doctest
import functools
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch._inductor import config

import moda_ops

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = {page.stem: page.read_text() for page in sorted(DOCS.glob("*.md"))}


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


SECTIONS = {
    f"{page}: {section.partition(chr(10))[0]}": blocks("python", section)
    for page, text in PAGES.items()
    for section in re.split(r"^## ", text, flags=re.MULTILINE)
    if blocks("python", section)
}
PACKAGES = SECTIONS.pop("pytorch: Ahead-of-time packages")
SESSIONS = [page for page, text in PAGES.items() if blocks("pycon", text)]
WITHOUT = """
import torch
try:
    torch._inductor.aoti_load_package("attention.pt2")
except RuntimeError as error:
    print(" ".join(str(error).split()))
"""
SAME = """
inputs = list(inputs)
expected = moda_ops.moda_attention(*inputs[:3], inputs[3:4], inputs[4:])
torch.testing.assert_close(out, expected)
print("the same")
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", SECTIONS)
def test_section(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # README's example runs through Inductor, these through all that comes before it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    module = ModuleType(section)
    monkeypatch.setitem(sys.modules, section, module)  # where Dynamo looks for its names
    exec(compile("\n".join(SECTIONS[section]), section, "exec"), vars(module))


@pytest.mark.parametrize("page", SESSIONS)
def test_session(page):
    session = "\n".join(blocks("pycon", PAGES[page]))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(session, {}, page, page, 0)
    results = doctest.DocTestRunner(optionflags=flags).run(test)
    assert results.attempted > 0 and results.failed == 0


def test_the_stream_of_the_model_page_is_in_the_dtype_of_autocast(monkeypatch):
    page, seen = {"__name__": "model"}, set()
    exec("\n".join(SECTIONS["model: The same with depth"]), page)
    attend = moda_ops.DepthStream.attend
    monkeypatch.setattr(
        moda_ops.DepthStream,
        "attend",
        lambda stream, q: (seen.add(stream.buffer.dtype), attend(stream, q))[1],
    )
    with torch.autocast("cpu", torch.bfloat16):
        page["model"](page["x"])
    assert seen == {torch.bfloat16}


def test_offloading_as_the_memory_page_advises_copies_no_slots():
    page = {"__name__": "memory"}
    exec("\n".join(SECTIONS["memory: # The memory law"]), page)

    def copied(layers, offload):
        stream = moda_ops.DepthStream.allocate(layers, 1, 16, 2, 8, like=page["x"])
        hooks, sizes = offload(stream), []
        pack = hooks.pack_hook
        hooks.pack_hook = lambda x: (sizes.append(x.nbytes * (pack(x) is not x)), pack(x))[1]
        with hooks:
            page["model"](page["x"], stream, layers)
        return sum(sizes)

    def growth(offload):
        few, more, most = (copied(layers, offload) for layers in (4, 8, 12))
        return (most - more) - (more - few)

    assert growth(page["offload_all_but"]) == 0  # the same for every four layers
    assert growth(lambda _: torch.autograd.graph.save_on_cpu()) > 0


def test_no_page_allocates_a_stream_in_the_dtype_of_an_input():
    """Under autocast that is float32, and attention would be too."""
    tutorials = (DOCS.parent / "tutorials").glob("*.ipynb")
    for text in (*PAGES.values(), *(tutorial.read_text() for tutorial in tutorials)):
        assert not re.search(r"DepthStream\.allocate\([^)]*dtype=x\.dtype", text)


def test_every_page_is_in_the_contents():
    contents = set(re.findall(r"^(?:[^<\n]*<)?(\w+)>?$", PAGES["index"], re.MULTILINE))
    assert set(PAGES) - {"index"} <= contents


def test_the_reference_has_every_public_name():
    assert [x for x in moda_ops.__all__ if f":: moda_ops.{x}\n" not in PAGES["reference"]] == []


def test_every_fence_is_known():
    """A code block in another language would not be run."""
    known = {"python", "pycon", "console", "text", ""}
    for page, text in PAGES.items():
        fences = set(re.findall(r"^```(.*)$", text, re.MULTILINE))
        assert {fence for fence in fences if not fence.startswith("{")} <= known, page


@pytest.mark.parametrize(("section", "gpu"), [("Where it stands", "h100"), ("On an H200", "h200")])
def test_tables_of_performance_are_what_was_recorded(section, gpu):
    """Medians of the runs: cuDNN's, the operator's, and those with a list of slots."""
    text = PAGES["performance"].split(f"## {section}\n")[1].split("\n## ")[0]
    plot = runpy.run_path(str(DOCS / "measurements" / "plot_operator.py"))
    depth_ms, measurements = plot["depth_ms"], plot["measurements"]
    recorded = json.loads((DOCS / "measurements" / f"{gpu}_operator.json").read_text())
    rate = max(run["copy_tb_per_s"] for run in recorded["runs"])
    rows = measurements(recorded)
    assert len(rows) == 10
    for shape, times in rows.items():
        (row,) = re.findall(rf"^\| {', '.join(map(str, shape))} \|(.*)\|$", text, re.M)
        told = [float(cell.split()[0]) for cell in row.split("|")]
        keys = [(name, part) for name in ("moda", "moda, list") for part in ("forward", "backward")]
        taken = [times["cuDNN", "forward"], times["cuDNN", "backward"], depth_ms(shape, rate)]
        taken += [times[keys[i]] for i in (0, 2, 1, 3)]
        assert told == pytest.approx(taken, rel=0.015), shape


@pytest.mark.filterwarnings("ignore")
def test_a_package_runs_in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package, load = PACKAGES
    settings = {"compile_wrapper_opt_level": "O0", "precompile_headers": False}  # to compile faster
    known = {f"aot_inductor.{name}" for name in settings} & config.get_config_copy().keys()
    with config.patch({name: settings[name.split(".")[1]] for name in known}):
        exec(compile(package, "package", "exec"), {})
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT + load + SAME],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    first, same = result.stdout.splitlines()
    assert "Could not find schema for moda::attention" in first and same == "the same"
