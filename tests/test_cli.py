import json
import subprocess
import sys

import pytest
from PIL import Image

import diffaccel
from diffaccel.cli import main
from diffaccel.samplers.catalog import SCHEDULES
from diffaccel.samplers.solvers import SOLVERS


def test_list_names_every_solver_and_schedule(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in (*SOLVERS, *SCHEDULES, "dpm++ 2m", "sgm uniform"):
        assert name in printed


def test_module_and_command_are_the_same():
    run = subprocess.run([sys.executable, "-m", "diffaccel", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"diffaccel {diffaccel.__version__}"


def test_sample_writes_a_picture_a_prompt(tmp_path, capsys):
    arguments = ["sample", "emoji-sd", "--prompt", "red heart", "--prompt", "blue book", "--steps", "3"]
    assert main([*arguments, "--scheduler", "DPM++ 2M Karras", "--output", str(tmp_path)]) == 0
    paths = capsys.readouterr().out.split()
    assert [Image.open(path).size for path in paths] == [(64, 64), (64, 64)]


def test_sample_opens_a_local_folder(tmp_path):
    folder = diffaccel.zoo.path("emoji-sd")
    assert main(["sample", str(folder), "--prompt", "x", "--steps", "1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "000.png").exists()


def test_demo_writes_grid_and_numbers(tmp_path, capsys):
    assert main(["demo", "--prompt", "red heart", "--steps", "4", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "demo.json").read_text())
    assert [r["network_calls"] for r in record["results"]] == [4, 4, 4]
    assert record["prompts"] == ["red heart, twemoji style"]
    assert len(record["seeds"]) == 8
    assert Image.open(tmp_path / "grid.png").width > 1000
    printed = capsys.readouterr().out
    assert "diffaccel" in printed
    assert "latent MSE" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "emoji-sd", "--prompt", "x", "--scheduler", "foo"], "unknown solver 'foo'; use ddim"),
        (["sample", "emoji-sd", "--prompt", "x", "--schedule", "foo"], "unknown schedule 'foo'; use linspace"),
        (["sample", "emoji-sd", "--prompt", "x", "--steps", "0"], "must be 1 or more, not 0"),
        (["sample", "emoji-sd", "--prompt", "x", "--steps", "1001"], "1000 training timesteps, not 1001"),
        (["sample", "emoji-clip", "--prompt", "x"], "makes no pictures; use emoji-sd"),
        (["sample", "emoji-sd", "--prompt", "x", "--device", "cuda"], "no CUDA device here"),
        (["demo", "--steps", "-1"], "must be 1 or more, not -1"),
    ],
)
def test_bad_input_is_one_sentence_without_a_traceback(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("diffaccel: error: ")
    assert words in error
    assert "Traceback" not in error


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path, capsys):
    assert main(["sample", str(tmp_path), "--prompt", "x"]) == 2
    assert "diffaccel: error: " in capsys.readouterr().err
