"""The code in docs/pytorch.md runs, each block by itself."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "pytorch.md").read_text()
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in TEXT.split("\n## ")[1:]
}
PACKAGES = SECTIONS.pop("Ahead-of-time packages")
SAME = """
inputs = list(inputs)
expected = moda_ops.moda_attention(*inputs[:3], inputs[3:4], inputs[4:])
torch.testing.assert_close(out, expected)
print("the same")
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("section", SECTIONS)
def test_section(section):
    (code,) = SECTIONS[section]
    exec(compile(code, section, "exec"), {})


@pytest.mark.filterwarnings("ignore")
def test_a_package_runs_in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package, load = PACKAGES
    exec(compile(package, "package", "exec"), {})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def fresh(code):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    result = fresh(load + SAME)
    assert result.stdout == "the same\n", result.stderr
    assert (
        "Could not find schema for moda::attention"
        in fresh(load.replace("import moda_ops\n", "")).stderr
    )
