"""Execute notebooks in place and bring them to the form in which they are committed.

`make tutorials` does all; `python tutorials/execute.py NAME.ipynb ...` does some.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}
CELL_METADATA = {"tags", "jupyter", "mystnb"}


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what differs from one run or machine to the next and is not an output."""
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    for cell in notebook.cells:
        for name in set(cell.metadata) - CELL_METADATA:
            del cell.metadata[name]
    return notebook


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(path: Path) -> None:
    notebook = read(path)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        timeout=300,  # of a cell
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    nbformat.write(normalise(notebook), path)


def main(paths: list[Path]) -> None:
    roots = [str(FOLDER.parent / name) for name in ("", "kernels", "reference")]
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)
    for path in paths:
        start = time.perf_counter()
        execute(path)
        sys.stdout.write(f"{path.name}: {time.perf_counter() - start:.0f} s\n")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")))
