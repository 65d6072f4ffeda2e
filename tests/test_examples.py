"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = {"swap_scheduler": 3, "solvers": 4, "fid_table": 3}  # that a notebook draws


def test_swap_scheduler_draws_its_grid(tmp_path):
    command = [sys.executable, str(EXAMPLES / "swap_scheduler.py"), "--steps", "3", "--output", "grid.png"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    assert Image.open(tmp_path / "grid.png").height > 400


def test_fid_table_writes_the_report(tmp_path):
    command = [sys.executable, str(EXAMPLES / "fid_table.py"), "--num", "6", "--rows", "2", "--timed-runs", "1"]
    done = subprocess.run(command, cwd=tmp_path, check=True, timeout=300, capture_output=True, text=True)
    table = (tmp_path / "fid-table" / "report.md").read_text()
    assert "DDIM 20" in table
    assert "FD[emoji-clip]" in table
    assert "FID" not in table
    assert table.strip() in done.stdout
    assert (tmp_path / "fid-table" / "report.html").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    cells = nbformat.read(notebook, as_version=4)
    NotebookClient(cells, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [out for cell in cells.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == PICTURES[notebook.stem]
