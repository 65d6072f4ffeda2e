"""One, two or three processes: the same bytes of pictures and features, and the same moments to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffaccel.eval import Moments, read_run
from diffaccel.eval.runs.run import verify
from tests.eval import toy
from tests.eval.test_kill import ROOT, hashes

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def launched(processes: int, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *LAUNCH, str(processes), "-m", "tests.eval.toy", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    out = tmp_path_factory.mktemp("worlds") / "alone"
    return out, toy.job(out)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_no_bit(tmp_path: Path, alone: tuple[Path, np.ndarray], processes: int) -> None:
    out = tmp_path / "together"
    done = launched(processes, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "environment.json").read_text())["processes"] == processes
    assert verify(read_run(out)) == []
    expected = hashes(alone[0])
    assert len([name for name in expected if name.endswith(".png")]) == 130
    assert len([name for name in expected if name.startswith("features")]) == 3
    assert hashes(out) == expected
    ours, theirs = Moments.of(toy.job(out).astype(np.float64)), Moments.of(alone[1].astype(np.float64))
    assert (ours.n, ours.mean.tobytes(), ours.m2.tobytes()) == (theirs.n, theirs.mean.tobytes(), theirs.m2.tobytes())


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    done = launched(2, tmp_path)
    assert done.returncode != 0
    assert "is not empty and holds no run" in done.stderr
