"""Writing that cannot be done or is stopped half-way: nothing is left, what was there stays."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from diffaccel.pruning.checkpoint import open_checkpoint
from diffaccel.pruning.surgery import cut
from diffaccel.pruning.write import new_folder, probe_masked, write_checkpoint
from tests.pruning.sources import tree
from tests.pruning.test_write import halved, pipeline, plan_of, run, source, written
from tests.pruning.toys import toy

resource = pytest.importorskip("resource")  # not on Windows
KILLED = """
import os, signal, sys
import diffaccel.pruning.write as write
from diffaccel.cli import main
write._compare = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(["prune", sys.argv[1], "--target", "0.8", "--runs", "0", "--device", "cpu", "--output", sys.argv[2]])
"""


def test_a_folder_that_is_taken_or_lies_in_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = pipeline(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    before = tree(tmp_path)
    for output, words in {
        "taken": "taken exists and is not empty; choose a new folder",
        "taken/x": "exists and is not empty",
        "source": "exists and is not empty",
        "source/smaller": "lies inside of the checkpoint",
        "source/vae/deep/smaller": "lies inside of the checkpoint",
    }.items():
        with pytest.raises(ValueError, match=words):
            written(checkpoint, tmp_path / output)
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    written(checkpoint, tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torn(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


PLACES = (
    "diffusers.UNet2DConditionModel.save_pretrained",
    "diffaccel.pruning.plan.PruningPlan.save",
    "diffaccel.pruning.write.load_model",
    "shutil.copyfile",
)


@pytest.mark.parametrize(("failure", "kind"), [(full, OSError), (torn, OSError), (stopped, KeyboardInterrupt)])
@pytest.mark.parametrize("place", PLACES)
def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, failure: Any, kind: type[BaseException]
) -> None:
    checkpoint = pipeline(tmp_path)
    model, before = checkpoint.load(), tree(tmp_path)
    plan = halved(model)
    smaller = cut(model, plan)
    monkeypatch.setattr(place, failure)
    with pytest.raises(kind, match=None if kind is KeyboardInterrupt else "No space left on device") as caught:
        write_checkpoint(checkpoint, smaller, plan, tmp_path / "a" / "b" / "out")
    assert tree(tmp_path) == before
    assert "\n" not in str(caught.value)


@contextmanager
def files_below(size: int) -> Iterator[None]:
    """No file gets larger in here: a write fails half-way, in Python and in what is written in Rust."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 500, 10_000, 30_000])
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, size: int) -> None:
    checkpoint = pipeline(tmp_path)
    model, before = checkpoint.load(), tree(tmp_path)
    plan = halved(model)
    smaller = cut(model, plan)
    with files_below(size), pytest.raises(OSError, match="File too large"):
        write_checkpoint(checkpoint, smaller, plan, tmp_path / "out")
    assert tree(tmp_path) == before
    write_checkpoint(checkpoint, cut(model, plan), plan, tmp_path / "out")  # and then there is room again


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    checkpoint = pipeline(tmp_path)
    model, before = checkpoint.load(), tree(tmp_path)
    plan = halved(model)
    masked = probe_masked(model, plan)
    wrong: Any = cut(model, plan)
    with torch.no_grad():
        wrong.conv_out.bias += 1
    with pytest.raises(ValueError, match=r"differs from the masked original by .*; nothing was written"):
        write_checkpoint(checkpoint, wrong, plan, tmp_path / "out", masked=masked)
    with torch.no_grad():
        wrong.conv_out.bias += torch.nan
    with pytest.raises(ValueError, match=r"returns NaN or infinity in torch.float32; nothing was written"):
        write_checkpoint(checkpoint, wrong, plan, tmp_path / "out")
    assert tree(tmp_path) == before


def test_weights_that_change_on_the_disk_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = source(tmp_path)
    model: Any = cut(toy("sd15"), plan_of("sd15"))

    def other(*_: Any, **__: Any) -> Any:
        with torch.no_grad():
            changed: Any = cut(toy("sd15"), plan_of("sd15"))
            changed.conv_out.weight[0] += 0.1
        return changed

    monkeypatch.setattr("diffaccel.pruning.write.load_model", other)
    with pytest.raises(ValueError, match="differs from the saved one by"):
        write_checkpoint(checkpoint, model, plan_of("sd15"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_process_that_was_faster(tmp_path: Path) -> None:
    with pytest.raises(OSError), new_folder(tmp_path / "a" / "out") as folder:  # noqa: PT011, PT012 (which one depends)
        (folder / "mine").touch()
        (tmp_path / "a" / "out").mkdir()
        (tmp_path / "a" / "out" / "theirs").touch()
    assert list(tree(tmp_path)) == ["a", "a/out", "a/out/theirs"]


@pytest.mark.slow
def test_a_killed_run_leaves_a_hidden_folder_and_no_output(tmp_path: Path) -> None:
    pipeline(tmp_path)
    done = run(KILLED, tmp_path / "source", tmp_path / "out")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[1:] == ["source"]
    assert left[0].startswith(".out.")
    written(open_checkpoint(str(tmp_path / "source"), tmp_path), tmp_path / "out")  # it is in nobody's way
