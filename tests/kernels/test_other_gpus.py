"""Kernels fit GPUs that we do not have: compiled for them, once for all lengths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "kernels" / "compile_for.py"
LEAST = 101_376  # bytes that one block may use on Ada and on consumer Blackwell; others have more


@pytest.mark.parametrize(
    ("capability", "dtype"), [(89, "bfloat16"), (89, "float32"), (120, "bfloat16")]
)
def test_shared_memory_suffices_and_lengths_share_compilations(capability: int, dtype: str) -> None:
    paths = [str(ROOT), str(ROOT / "kernels")]
    command = [sys.executable, str(SCRIPT), str(capability), str(LEAST), "256", dtype, "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    needed, compilations, narrow = json.loads(done.stdout)
    assert len(needed) == 12
    assert max(needed.values()) <= LEAST, needed
    assert compilations == compilations[:1] * 3
    assert narrow == []


def test_every_kernel_runs():
    command = [sys.executable, str(SCRIPT.with_name("every_kernel.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
