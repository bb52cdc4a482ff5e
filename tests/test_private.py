"""Private names of PyTorch stand in one module of each package, and a missing one is named."""

import ast
import pathlib
import re

import pytest
import torch

import moda_kernels
import moda_ops
from moda_ops import private

ALLOWED = {"moda_ops": "private.py", "moda_kernels": "sdpa.py"}


def private_names(source: str) -> set[str]:
    """What a file takes from PyTorch under a name that begins with one underscore."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {x for x in found if re.match(r"(torch|aten|forward_ad)\b.*\._[^_]", x)}


@pytest.mark.parametrize("package", [moda_ops, moda_kernels], ids=lambda x: x.__name__)
def test_private_names_stand_in_one_module(package):
    (folder,) = package.__path__
    for path in pathlib.Path(folder).rglob("*.py"):
        if path.name != ALLOWED[package.__name__]:
            assert not private_names(path.read_text()), path


def test_the_test_sees_private_names():
    source = "import torch\nfrom torch._C import x\nfrom torch.a import _b\ntorch._dynamo.reset()\n"
    dynamo = {"torch._dynamo", "torch._dynamo.reset"}
    assert private_names(source) == {"torch._C.x", "torch.a._b"} | dynamo
    assert not private_names("torch.__version__\nself._x\ntorch.nn.functional.pad\n")


@pytest.mark.parametrize("path", ["torch._C._gone", "torch.utils._pytree._gone"])
def test_a_missing_name_is_said(path):
    with pytest.raises(ImportError) as caught:
        private._find(path)
    assert str(caught.value) == (
        f"PyTorch {torch.__version__} has no {path}, which moda_ops uses; it is tested with "
        "PyTorch 2.11 and 2.13"
    )
