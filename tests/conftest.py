"""Kernels run compiled where there is a GPU, and through Triton's interpreter elsewhere."""

import gc
import os
import sys
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
# AOTAutograd's cache on disk does not notice that an operator's backward has changed.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_collection_finish() -> None:
    """No garbage collection looks again at what has been imported, nor does ``gc.get_objects``."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def memory_is_handed_back():
    """Test processes side by side share one GPU, and PyTorch keeps what a large test has taken."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """Results that are allocated and never written show as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def interpreter_patches_once():
    """Triton's interpreter replaces the functions of ``triton.language`` in every launch, and again
    in every call of a device function, which takes a third of all its time. Here a call finds what
    its launch has replaced."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if hasattr(interpreter, "_LangPatchScope") and not hasattr(interpreter, "_patched_languages"):
        interpreter._patched_languages = set()
        interpreter._patch_lang = _patching_once(interpreter)


def _patching_once(interpreter: Any) -> Any:
    patch, patched = interpreter._patch_lang, interpreter._patched_languages
    modules = (interpreter.tl, interpreter.tl.core)
    seen_by: dict[Any, frozenset[int]] = {}

    def patch_once(fn: Any) -> Any:
        if fn not in seen_by:
            seen_by[fn] = frozenset(id(x) for x in fn.__globals__.values() if x in modules)
        if seen_by[fn] <= patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        patched.update(seen_by[fn])
        restore = scope.restore

        def restore_all() -> None:  # the launch does, a call does not
            restore()
            patched.clear()

        scope.restore = restore_all
        return scope

    return patch_once
