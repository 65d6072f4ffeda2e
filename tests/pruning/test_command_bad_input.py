"""Bad input of `diffaccel prune`: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import diffaccel
from diffaccel.cli import main
from diffaccel.pruning.command import read_prompts
from tests.pruning.sources import pruned, tree

BAD = {
    "a target out of reach": ("sd", ("--target", "0.01"), "at best, not to 0.01; raise the target"),
    "a target below zero": ("sd", ("--target", "-1"), r"in \(0, 1\], not -1"),
    "a target that is no number": ("sd", ("--target", "nan"), r"in \(0, 1\], not nan"),
    "nothing to remove": ("sd", ("--target", "1"), "removes nothing"),
    "no checkpoint": (".", (), "is no checkpoint"),
    "another class": ("sd/vae", (), "cannot prune the AutoencoderKL in .*; known are UNet2DModel"),
    "a component": ("sd", ("--component", "vae"), "has no component vae; there are unet"),
    "a variant": ("sd", ("--variant", "fp16"), r"has no weights \*.fp16.safetensors"),
    "a device": ("sd", ("--device", "tpu9"), "there is no device tpu9 here; use --device"),
    "a kind": ("sd", ("--kinds", "foo"), "unknown kind 'foo'; use heads"),
    "kinds that are not there": ("dit", ("--kinds", "channels"), "has no channels to remove"),
    "a size of shards": ("dit", ("--max-shard-size", "abc"), "abc"),
    "a size": ("sd", ("--size", "0"), "size 0x0 does not fit"),
    "runs": ("dit", ("--runs", "-1"), "--runs must be 0"),
    "a seed": ("dit", ("--seed", "-1", "--criterion", "random"), "non-negative"),
    "no prompts": ("sd", ("--criterion", "taylor"), "give --prompts FILE, with a prompt a line"),
    "empty prompts": ("sd", ("--prompts", "empty.txt"), "empty.txt has no prompts; write one a line"),
    "prompts that are not there": ("sd", ("--prompts", "nosuch.txt"), "cannot read prompts from .*nosuch.txt"),
    "prompts for nothing": (
        "sd",
        ("--prompts", "texts.txt", "--criterion", "magnitude"),
        "magnitude looks at no prompts",
    ),
    "prompts of a model": ("model", ("--prompts", "texts.txt"), "is a single network and reads no prompts"),
    "prompts without text": ("ddpm", ("--prompts", "texts.txt"), "draws without prompts"),
    "texts as classes": ("dit", ("--prompts", "texts.txt"), "a number from 0 to 999, not 'a red heart'"),
    "no steps": ("ddpm", ("--criterion", "taylor", "--steps", "0"), "needs calls >= 1 and steps >= 1"),
    "no calls": ("model", ("--criterion", "taylor", "--calls", "0"), "at least one call"),
    "a config": ("original.safetensors", ("--config", "nosuch"), "--config .*nosuch is no folder"),
    "another config": ("original.safetensors", ("--config", "sd"), "cannot be opened with the config"),
    "inside": ("sd", ("--output", "sd/smaller"), "lies inside of the checkpoint"),
    "deep inside": ("sd", ("--output", "sd/vae/a/smaller"), "lies inside of the checkpoint"),
    "in place": ("sd", ("--output", "sd"), "exists and is not empty; choose a new folder"),
    "a file": ("sd", ("--output", "texts.txt"), "exists and is not empty"),
    "under a file": ("sd", ("--output", "texts.txt/out"), "cannot write into .*texts.txt; choose"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_a_sentence(
    saved: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, options, words = BAD[what]
    monkeypatch.chdir(saved)
    names = set(tree(saved))
    assert pruned(name, tmp_path / "a" / "out", *options) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffaccel: error: ")]
    assert len(said) == 1
    assert re.search(words, said[0])
    assert tree(tmp_path) == {}
    assert set(tree(saved)) == names


def test_names_that_are_chosen_from_a_list(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--criterion", "--budget", "--cost", "--dtype"):
        with pytest.raises(SystemExit, match="2"):
            pruned(saved / "sd", tmp_path / "out", option, "foo")
        assert f"argument {option}: invalid choice: 'foo'" in capsys.readouterr().err
    assert main(["prune", str(saved / "sd"), "--target", "0.8"]) == 2
    assert "say where to write: --output DIR, or --dry-run" in capsys.readouterr().err


def test_the_names_are_those_of_the_code() -> None:
    from diffaccel.pruning import command_line
    from diffaccel.pruning.budgets.allocation import METHODS
    from diffaccel.pruning.criteria import CRITERIA

    costs = importlib.import_module("diffaccel.pruning.prune").COSTS
    assert set(command_line.CRITERIA) == set(CRITERIA)
    assert set(command_line.BUDGETS) == set(METHODS)
    assert set(command_line.COSTS) == set(costs)


@pytest.mark.parametrize(
    ("place", "error", "status", "words"),
    [
        ("shutil.copyfile", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "error: .*No space left on device"),
        ("diffusers.DiTTransformer2DModel.save_pretrained", KeyboardInterrupt(), 130, "interrupted"),
        ("diffaccel.pruning.command.write_report", OSError(errno.ENOSPC, "No space left"), 2, "error: .*No space left"),
    ],
)
def test_failures_half_way(
    saved: Path,
    tmp_path: Path,
    place: str,
    error: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    assert pruned(saved / "dit", tmp_path / "a" / "out") == status
    assert re.search(words, capsys.readouterr().err)
    assert tree(tmp_path) == {}


def test_a_damaged_text_encoder(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(diffaccel.zoo.path("emoji-sd"), tmp_path / "source")
    file = tmp_path / "source" / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert pruned(tmp_path / "source", tmp_path / "out", "--prompts", str(saved / "texts.txt")) == 2
    assert "diffaccel: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("\ufeffa ünicode 😀 prompt\r\n\r\n  b  \n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p")[-1] == "b"
    (tmp_path / "p").write_text("1\n 22\n")
    assert read_prompts(tmp_path / "p") == ["1", "22"]
    assert read_prompts(tmp_path / "p", classes=23) == [1, 22]
    for wrong in ("22", "²", "-1", "1.0"):
        (tmp_path / "p").write_text(f"1\n{wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(f"a number from 0 to 9, not {wrong!r}")):
            read_prompts(tmp_path / "p", classes=10)
    (tmp_path / "p").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read prompts from"):
        read_prompts(tmp_path / "p")
