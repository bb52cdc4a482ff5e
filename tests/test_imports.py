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


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in memory after ``statement`` in a fresh process."""
    code = f"import sys; sys.path[:0] = {[str(p.parent) for p in SOURCES.values()]}; {statement}; "
    code += "print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_importing_moda_ops_loads_no_kernels():
    # PyTorch itself decides whether it loads Triton, so Triton must be what plain torch loads.
    extra = loaded_by("import moda_ops, moda_ops.nn") - loaded_by("import torch")
    assert "moda_ops" in extra
    assert not extra & {"triton", "moda_kernels", "moda_reference", "click", "matplotlib", "tqdm"}
    assert not extra & {"transformers", "safetensors", "sklearn"}


NEEDED = "ImportError: moda_ops.hf needs transformers 4.57 or newer: pip install 'moda-ops[hf]'"


def test_hf_without_transformers_names_the_extra():
    code = "import sys; sys.modules['transformers'] = None; import moda_ops.hf"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == NEEDED


def test_hf_with_an_old_transformers_names_the_versions():
    code = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "4.56.2" if name == "transformers" else version(name)
import moda_ops.hf
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == NEEDED
    assert "transformers>=4.57 is required" in result.stderr and "4.56.2" in result.stderr


def test_cpu_tensors_never_load_the_kernels():
    call = "x = __import__('torch').zeros(1, 2, 1, 16); moda_ops.moda_attention(x, x, x)"
    assert not loaded_by(f"import moda_ops; {call}") & {"triton", "moda_kernels"}


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
