"""Killed in the middle of pictures, then in the middle of features: what comes out in the end is the same."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffaccel.eval import read_run
from diffaccel.eval.runs.run import verify
from tests.eval import toy

ROOT = Path(__file__).parents[2]


def killed_in(place: str, out: Path) -> None:
    command = [sys.executable, "-m", "tests.eval.toy", str(out), "--die-in", place]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all finished files but the environment's."""
    files = [file for file in folder.rglob("*") if file.is_file() and ".part" not in str(file.relative_to(folder))]
    kept = [file for file in files if file.name != "environment.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    killed_in("save", out)
    left = sorted(path.name for path in (out / "images").iterdir())
    assert left[-1] == "00000"
    assert len(left) == 2
    assert left[0].startswith(".00001.")
    assert 0 < len(list((out / "images" / left[0]).iterdir())) < 64  # half a shard
    killed_in("rename", out)
    assert len(read_run(out).paths) == 130
    kept = sorted(path.name for path in (out / "features" / "toy-clean").iterdir())
    assert len(kept) == 2
    assert kept[0].startswith(".00001.safetensors.")
    assert kept[1] == "00000.safetensors"
    features = toy.job(out)
    assert np.array_equal(features, toy.job(tmp_path / "whole"))
    assert hashes(out) == hashes(tmp_path / "whole")
    assert verify(read_run(out)) == []
