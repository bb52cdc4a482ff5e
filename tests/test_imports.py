"""Who imports whom: what the packages load, in fresh processes, and what their files name."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = {
    "moda_ops": ROOT / "moda_ops",
    "moda_kernels": ROOT / "kernels" / "moda_kernels",
    "moda_reference": ROOT / "reference" / "moda_reference",
}
FORBIDDEN = {
    "moda_ops": {"tests", "tutorials"},
    "moda_kernels": {"moda_ops", "moda_reference", "tests", "tutorials"},
    "moda_reference": {"moda_ops", "moda_kernels", "torch", "triton", "tests", "tutorials"},
}


TRIES = """
import importlib.metadata, os, sys, torch

version, plain = importlib.metadata.version, {name.split(".")[0] for name in sys.modules}
def old(name): return "4.56.2" if name == "transformers" else version(name)
def load(): import moda_ops, moda_ops.nn
def call():
    import moda_ops
    x = torch.zeros(1, 2, 1, 16)
    moda_ops.moda_attention(x, x, x)
def hf_without_transformers():
    sys.modules["transformers"] = None
    import moda_ops.hf
def hf_with_an_old_transformers():
    importlib.metadata.version = old
    import moda_ops.hf

for attempt in (load, call, hf_without_transformers, hf_with_an_old_transformers):
    if child := os.fork():  # each in a process that has imported PyTorch alone
        os.waitpid(child, 0)
        continue
    try:
        attempt()
        said = sorted({name.split(".")[0] for name in sys.modules} - plain)
    except ImportError as error:
        said = [f"ImportError: {error}", repr(error.__cause__)]
    print([attempt.__name__, *said], flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """Of each of TRIES what it has loaded beside PyTorch, or why it could not."""
    roots = [str(path.parent) for path in SOURCES.values()]
    code = f"import sys; sys.path[:0] = {roots}\n{TRIES}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = map(ast.literal_eval, result.stdout.splitlines())
    found = {name: rest for name, *rest in lines}
    assert len(found) == 4, result.stderr
    return found


def test_importing_moda_ops_loads_no_kernels(said):
    # PyTorch itself decides whether it loads Triton, so Triton must be what plain torch loads.
    extra = set(said["load"])
    assert "moda_ops" in extra
    assert not extra & {"triton", "moda_kernels", "moda_reference", "click", "matplotlib", "tqdm"}
    assert not extra & {"transformers", "safetensors", "sklearn"}


def test_cpu_tensors_never_load_the_kernels(said):
    assert "moda_ops" in said["call"] and not {"triton", "moda_kernels"} & set(said["call"])


NEEDED = "ImportError: moda_ops.hf needs transformers 4.57 or newer: pip install 'moda-ops[hf]'"


def test_hf_without_transformers_names_the_extra(said):
    assert said["hf_without_transformers"][0] == NEEDED


def test_hf_with_an_old_transformers_names_the_versions(said):
    message, cause = said["hf_with_an_old_transformers"]
    assert message == NEEDED and "transformers>=4.57 is required" in cause and "4.56.2" in cause


def imports(path: pathlib.Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", SOURCES)
def test_import_directions(package):
    for path in SOURCES[package].rglob("*.py"):
        assert not imports(path) & FORBIDDEN[package], path
        if package == "moda_ops":
            assert not imports(path, top_level_only=True) & {"triton", "moda_kernels"}, path


def test_the_rules_can_fail(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from moda_ops.operators.definition import x\n")
    assert imports(file) == {"moda_ops"} and not imports(file, top_level_only=True)
