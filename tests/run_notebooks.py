"""Executes every notebook from a clean kernel; `--write` keeps the outputs."""

from __future__ import annotations

import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


def main(write: bool) -> None:
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert paths, f"no notebook in {NOTEBOOKS}"
    for path in paths:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
        if write:
            temporary = path.with_suffix(".tmp")
            nbformat.write(notebook, temporary)
            temporary.replace(path)
        print(f"{path.name}: {len(notebook.cells)} cells in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main("--write" in sys.argv)
