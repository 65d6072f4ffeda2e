"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = {"swap_scheduler": 3, "solvers": 4, "fid_table": 3, "prune_stable_diffusion": 3}  # that a notebook draws


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


def test_prune_stable_diffusion_saves_what_it_draws(tmp_path):
    command = [sys.executable, str(EXAMPLES / "prune_stable_diffusion.py"), "--steps", "2", "--calls", "4"]
    command += ["--target", "0.8", "--preview", "0.6"]
    done = subprocess.run(command, cwd=tmp_path, check=True, timeout=300, capture_output=True, text=True)
    costs = {words[0]: float(words[1]) for line in done.stdout.splitlines() if "GMACs" in (words := line.split())}
    assert 0.7 < costs["after"] / costs["before"] <= 0.8
    assert "opened again as PrunedUNet2DConditionModel" in done.stdout
    assert int(done.stdout.partition("differ by ")[2].split()[0]) <= 1  # kernels may round a last bit otherwise
    assert (tmp_path / "pruned" / "unet" / "pruning_plan.json").is_file()
    assert Image.open(tmp_path / "pruned.png").height > 4 * 128  # full, two masks, the cut


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    cells = nbformat.read(notebook, as_version=4)
    NotebookClient(cells, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [out for cell in cells.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == PICTURES[notebook.stem]
