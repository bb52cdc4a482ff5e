"""Who imports whom: what the packages load, in fresh processes, and what their files name."""

import ast
import functools
import graphlib
import importlib.util
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


# Rooms of moda_ops: a module imports its own room and the floors below, and within a room there is
# no cycle. Imports inside functions and for the type checker count.

FLOORS = [
    {"private"},
    {"rules"},  # torch alone
    {"operators"},
    {"stream", "policies", "distributed"},
    {"nn"},
    {"hf", "tools"},
    {"__init__", "__main__"},
]
ROOMS = sorted(set().union(*FLOORS))
UPWARDS = {("moda_ops.tools.cli", "moda_ops"): "--version prints the package's __version__"}


@functools.cache
def graph(package: pathlib.Path) -> dict[str, set[str]]:
    """What every module of a package imports: its own modules in full, of others the first name."""
    paths = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imports_of(name, path, paths) for name, path in paths.items()}


def imports_of(name: str, path: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
    names = set()
    parent = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), parent)
            inner = {alias.name: f"{source}.{alias.name}" for alias in node.names}
            names |= {full if full in known else source for full in inner.values()}
    return {name if name in known else name.split(".")[0] for name in names}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def floor(module: str) -> int:
    (index,) = [i for i, rooms in enumerate(FLOORS) if room(module) in rooms]
    return index


def upwards(modules: dict[str, set[str]], of: str) -> set[tuple[str, str]]:
    """Imports by this room's modules that do not go down, and those of the lowest but torch."""
    found = set()
    for module, imported in modules.items():
        if room(module) != of:
            continue
        for name in imported:
            if name in modules:
                if room(name) != of and floor(name) >= floor(module):
                    found.add((module, name))
            elif floor(module) <= 1 and name not in {"torch", *sys.stdlib_module_names}:
                found.add((module, name))
    return found


def check_cycles(modules: dict[str, set[str]], of: str) -> None:
    """Raise graphlib.CycleError if modules of this room import each other in a circle."""
    inside = {module for module in modules if room(module) == of}
    graphlib.TopologicalSorter({m: modules[m] & inside for m in inside}).prepare()


@pytest.mark.parametrize("of", ROOMS)
def test_no_module_imports_upwards(of):
    assert upwards(graph(SOURCES["moda_ops"]), of) <= set(UPWARDS)


@pytest.mark.parametrize("of", ROOMS)
def test_no_cycle_within_a_room(of):
    check_cycles(graph(SOURCES["moda_ops"]), of)


def test_every_module_has_a_floor_and_every_exception_is_one():
    modules = graph(SOURCES["moda_ops"])
    assert {room(module) for module in modules} == set(ROOMS)
    assert set(UPWARDS) <= {pair for of in ROOMS for pair in upwards(modules, of)}


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("nn/layers.py", "from moda_ops.hf import MoDACache", "moda_ops.hf"),
        ("nn/layers.py", "from moda_ops import hf", "moda_ops.hf"),
        ("nn/layers.py", "import moda_ops.hf.model", "moda_ops.hf.model"),
        ("nn/layers.py", "from ..hf.model import MoDAForCausalLM", "moda_ops.hf.model"),
        ("nn/layers.py", "def f():\n    from moda_ops import moda_attention", "moda_ops"),
        ("nn/__init__.py", "if TYPE_CHECKING:\n    from ..hf import model", "moda_ops.hf.model"),
        ("tools/demo.py", "from moda_ops.hf import model", "moda_ops.hf.model"),
        ("rules/vmap.py", "from moda_ops.nn import layers", "moda_ops.nn.layers"),
        ("rules/vmap.py", "import numpy", "numpy"),
        ("rules/vmap.py", "import torch, functools", None),
        ("nn/layers.py", "from moda_ops.rules import vmap", None),
        ("nn/layers.py", "from moda_ops.nn import cache", None),
        ("hf/model.py", "from moda_ops import nn", None),
        ("hf/model.py", "import transformers", None),
    ],
)
def test_an_import_upwards_is_found(tmp_path, file, line, found):
    package = tmp_path / "moda_ops"
    for name in ("nn/layers", "nn/cache", "hf/model", "tools/demo", "rules/vmap"):
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        (path.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / file).write_text(line)
    module = f"moda_ops.{file[:-3].replace('/', '.')}".removesuffix(".__init__")
    wanted = set() if found is None else {(module, found)}
    assert {pair for of in ROOMS for pair in upwards(graph(package), of)} == wanted


def test_a_cycle_is_found(tmp_path):
    package = tmp_path / "moda_ops"
    (package / "nn").mkdir(parents=True)
    for name, line in (("a", "from moda_ops.nn.b import x"), ("b", "def f(): from . import a")):
        (package / "nn" / f"{name}.py").write_text(line)
    check_cycles(graph(package), "tools")
    with pytest.raises(graphlib.CycleError, match=r"moda_ops\.nn\.a"):
        check_cycles(graph(package), "nn")
