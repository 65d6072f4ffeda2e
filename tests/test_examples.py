"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = {"swap_scheduler": 3, "solvers": 4}  # that a notebook draws


def test_swap_scheduler_draws_its_grid(tmp_path):
    command = [sys.executable, str(EXAMPLES / "swap_scheduler.py"), "--steps", "3", "--output", "grid.png"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    assert Image.open(tmp_path / "grid.png").height > 400


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    cells = nbformat.read(notebook, as_version=4)
    NotebookClient(cells, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [out for cell in cells.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == PICTURES[notebook.stem]
