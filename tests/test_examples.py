"""The examples run as they stand."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from diffaccel import zoo
from diffaccel.samplers.policy.exits import FittedExits
from diffaccel.samplers.search import Recipe

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURES = {  # that a notebook draws
    "swap_scheduler": 3, "solvers": 4, "fid_table": 3, "prune_stable_diffusion": 3, "stitch": 6, "early_exit": 4,
    "edit": 7, "search": 4,
}  # fmt: skip


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


def ran(name, folder, *arguments):
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=folder, check=True, timeout=300, capture_output=True, text=True).stdout


def test_stitch_writes_the_frontier(tmp_path):
    few = ("--steps", "5", "--prompt", "red heart", "open book", "--fractions", "0.4", "1")
    printed = ran("stitch", tmp_path, *few)
    assert printed.startswith("2 x small, 3 x full: ")
    assert "after handle.remove() by 0\n" in printed
    points = json.loads((tmp_path / "stitched" / "frontier.json").read_text())["points"]
    assert [point["name"] for point in points] == ["0% small", "40% small", "100% small"]
    assert [round(point["share"], 2) for point in points] == [1.0, 0.71, 0.28]
    assert Image.open(tmp_path / "stitched" / "pictures.png").height > 3 * 96
    assert (tmp_path / "stitched" / "frontier.png").is_file()


def test_stitch_takes_a_pipeline_or_a_network_of_a_folder(tmp_path):
    small, pipe = zoo.load("emoji-sd-small"), zoo.load("emoji-sd")
    small.save_pretrained(tmp_path / "network")
    pipe.unet = small
    pipe.save_pretrained(tmp_path / "pipeline")
    few = ("--steps", "3", "--prompt", "red heart", "--fractions", "--fraction", "0.7", "--own-scheduler")
    printed = [
        ran("stitch", tmp_path, "--small", name, "--output", f"{name}-out", *few) for name in ("network", "pipeline")
    ]
    tables = [text.splitlines()[:2] for text in printed]
    assert tables[0] == tables[1]
    assert tables[0][0].startswith("2 x small, 1 x full: ")


def test_early_exit_draws_its_schedules_beside_fewer_steps(tmp_path):
    few = ("--steps", "4", "--fit", "2", "--parts", "2", "--target", "0.9", "0.5")
    printed = ran("early_exit", tmp_path, *few)
    assert printed.startswith("timesteps")
    shares = [float(part.split("; ")[1].split("%")[0]) for part in printed.split("target ")[1:]]
    assert 41 < shares[1] <= 50 < shares[0] <= 90
    assert FittedExits.load(tmp_path / "early-exit" / "exits.safetensors").layers == 3
    assert Image.open(tmp_path / "early-exit" / "pictures.png").height > 5 * 128  # whole, and two with each target


def test_edit_changes_the_mask_and_nothing_far_from_it(tmp_path):
    printed = ran("edit", tmp_path, "--steps", "3")
    assert "network calls: 3 sparse;" in printed
    assert "network calls: 3 dense;" in printed
    before, sparse, dense = (pixels(tmp_path / "edited" / f"{name}.png") for name in ("reference", "sparse", "dense"))
    rows, columns = np.any(before != sparse, axis=2).nonzero()
    assert rows.max() < 136
    assert columns.min() > 140
    assert np.abs(sparse - before)[26:120, 156:].mean() > 2 * np.abs(sparse - dense)[26:120, 156:].mean()
    assert Image.open(tmp_path / "edited" / "grid.png").width > 5 * 256


def test_edit_takes_a_picture_and_a_mask_from_files(tmp_path):
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "picture.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 28, 28))
    mask.save(tmp_path / "mask.png")
    files = ("--image", "picture.png", "--mask", "mask.png", "--model", "emoji-sd", "--reference", "self")
    printed = ran("edit", tmp_path, *files, "--prompt", "orange", "--edit-prompt", "red heart", "--steps", "4")
    assert "network calls: 2 dense, 2 sparse;" in printed
    before, sparse = (pixels(tmp_path / "edited" / f"{name}.png") for name in ("reference", "sparse"))
    changed = np.abs(sparse - before)
    assert changed[8:28, 8:28].mean() > 5 * changed[:, 48:].mean()  # not 0: so small a picture is decoded whole


def test_search_writes_a_recipe_and_pictures(tmp_path):
    few = ("--method", "iia", "--steps", "3", "--num", "8", "--pairs", "6", "--reference-steps", "8")
    printed = ran("search", tmp_path, *few)
    folder = tmp_path / "searched"
    (entry,) = Recipe.load(folder / "recipe.json").entries
    low, middle, high = entry.measured["default"]["ratio"]
    assert f"{middle:.2f} ({low:.2f} to {high:.2f}) times the error of er_ode_1_corrected" in printed
    assert (entry.method, entry.steps, entry.guidance_scale) == ("iia", 3, 4.0)
    assert Image.open(folder / "pictures.png").height > 3 * 128  # reference, default, recipe
    assert Image.open(folder / "recipe.png").width > 800


def pixels(path):
    return np.array(Image.open(path), int)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    cells = nbformat.read(notebook, as_version=4)
    NotebookClient(cells, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [out for cell in cells.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == PICTURES[notebook.stem]
