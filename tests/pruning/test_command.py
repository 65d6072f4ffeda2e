"""`diffaccel prune`: every toy pipeline, what it prints and writes; bad input gets a sentence and leaves nothing."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import diffaccel
from diffaccel.cli import main
from diffaccel.cost import macs, parameters
from diffaccel.pruning import PruningPlan, cut, example_inputs, find_groups, load_model
from diffaccel.pruning.command import read_prompts
from tests import tiny
from tests.pruning.sources import original_layout, tree
from tests.pruning.toys import toy

PIPELINES = ("sd", "sdxl", "dit", "pixart", "sd3", "flux")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all sources; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("sources")
    for name in PIPELINES:
        getattr(tiny, name)()[0].save_pretrained(folder / name)
    diffusers.DDPMPipeline(toy("unconditional"), diffusers.DDPMScheduler()).save_pretrained(folder / "ddpm")
    toy("sd15").save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("a red heart\n\na blue book\n")
    (folder / "classes.txt").write_text("3\n")
    (folder / "empty.txt").write_text("\n \n")
    pipe = diffaccel.zoo.load("emoji-sd", dtype=torch.float16)
    save_file(original_layout(pipe), folder / "original.safetensors")
    return folder


def pruned(source: str | Path, output: Path, *options: str, target: str = "0.8") -> int:
    quick = () if "--runs" in options else ("--runs", "0")
    return main(
        ["prune", str(source), "--target", target, "--output", str(output), "--device", "cpu", *quick, *options]
    )


def denoiser(folder: Path) -> Any:
    inside = [folder / name for name in ("unet", "transformer") if (folder / name).is_dir()]
    return load_model((inside or [folder])[0])


def quantities(report: str, row: str) -> list[str]:
    return [cell.strip() for cell in re.findall(rf"\| {row}[^|]*\|([^|]*)\|([^|]*)\|", report)[0]]


@pytest.mark.parametrize("name", [*PIPELINES, "ddpm", "model"])
def test_every_pipeline(saved: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pruned(saved / name, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    before, after = denoiser(saved / name), denoiser(tmp_path / "out")
    inputs = example_inputs(before)
    share = macs(after, **inputs) / macs(before, **inputs)
    assert 0.7 < share <= 0.8
    assert f"{share:.1%} of the MACs" in printed
    assert f"{parameters(after) / parameters(before):.1%} of the parameters" in printed
    assert "it opens once diffaccel is imported" in printed
    report = (tmp_path / "out" / "pruning_report.md").read_text()
    assert f"{share:.1%}" in report
    assert {"pruning.png", "pruning_layers.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert sorted(os.listdir(tmp_path)) == ["out"]
    plan = PruningPlan.load(next((tmp_path / "out").rglob("pruning_plan.json")))
    assert plan.facts["checkpoint"] == str(saved / name)
    state = cut(before, plan).state_dict()
    assert all(value.equal(state[key]) for key, value in after.state_dict().items())


@pytest.mark.parametrize("kinds", ["depth", "both", "heads, neurons", "mid_block,layer,resnet"])
def test_kinds(saved: Path, tmp_path: Path, kinds: str) -> None:
    assert pruned(saved / "model", tmp_path / "out", "--kinds", kinds, "--budget", "global") == 0
    plan = PruningPlan.load(tmp_path / "out")
    named = {"depth": diffaccel.pruning.DEPTH, "both": diffaccel.pruning.WIDTH + diffaccel.pruning.DEPTH}
    wanted = named.get(kinds) or tuple(kind.strip() for kind in kinds.split(","))
    found = find_groups(toy("sd15")).found
    assert {found[name].kind for name in plan.removed} <= set(wanted)
    assert plan.facts["kinds"] == list(wanted)


def test_blocks_alone_open_without_diffaccel(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        pruned(saved / "model", tmp_path / "out", "--kinds", "mid_block", "--criterion", "evenly_spaced", target="0.95")
        == 0
    )
    assert "stock Diffusers opens it" in capsys.readouterr().out
    assert type(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")) is diffusers.UNet2DConditionModel
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mid_block_type"] is None


@pytest.mark.parametrize("cost", ["parameters", "latency"])
def test_costs(saved: Path, tmp_path: Path, cost: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        pruned(saved / "dit", tmp_path / "out", "--cost", cost, "--runs", "1", "--budget", "uniform", target="0.95")
        == 0
    )
    printed = capsys.readouterr().out
    assert "of the time a call" in printed
    assert PruningPlan.load(tmp_path / "out" / "transformer").facts["cost"] == cost
    if cost == "parameters":
        assert parameters(denoiser(tmp_path / "out")) <= 0.95 * parameters(denoiser(saved / "dit"))


@pytest.mark.parametrize("output", [(), ("--output", "out")])
def test_a_dry_run_writes_nothing(
    saved: Path,
    tmp_path: Path,
    output: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = tree(saved)
    assert main(["prune", str(saved / "sd"), "--target", "0.8", "--dry-run", "--device", "cpu", *output]) == 0
    assert tree(tmp_path) == {}
    assert tree(saved) == before
    printed = capsys.readouterr().out
    assert "(dry run)" in printed
    assert "MACs" in printed


def test_only_the_denoiser_is_loaded_unless_there_are_prompts(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise ValueError("the text encoders were loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", loaded)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    assert pruned("emoji-sd", tmp_path / "out") == 0
    assert pruned("emoji-sd", tmp_path / "two", "--prompts", str(saved / "texts.txt")) == 2


def test_prompts_and_the_type_that_is_stored(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--calls", "2", "--steps", "2", "--guidance-scale", "2")
    assert pruned("emoji-sd", tmp_path / "out", "--prompts", str(saved / "texts.txt"), *few) == 0
    facts = PruningPlan.load(tmp_path / "out" / "unet").facts
    assert {key: facts[key] for key in ("criterion", "prompts", "steps", "calls")} == {
        "criterion": "taylor",
        "prompts": "texts.txt",
        "steps": 2,
        "calls": 2,
    }
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert type(pipe.unet) is diffaccel.PrunedUNet2DConditionModel
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    size, before = [
        sum(len(data) for name, data in tree(folder / "unet").items() if name.endswith(".safetensors"))
        for folder in (tmp_path / "out", diffaccel.zoo.path("emoji-sd"))
    ]
    assert size < 0.97 * before
    assert "float32" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "prompts"), [("dit", "classes.txt"), ("ddpm", None), ("model", None)])
def test_calibration_without_texts(saved: Path, tmp_path: Path, name: str, prompts: str | None) -> None:
    given = ("--prompts", str(saved / prompts)) if prompts else ()
    few = ("--calls", "2", "--steps", "2", "--criterion", "activation")
    assert pruned(saved / name, tmp_path / "out", *few, *given) == 0
    facts = PruningPlan.load(next((tmp_path / "out").rglob("pruning_plan.json"))).facts
    assert facts["calls_from"] == ("random" if name == "model" else "trajectories")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_not_rounded_to_the_type_of_the_computation(saved: Path, tmp_path: Path, dtype: str) -> None:
    assert pruned(saved / "model", tmp_path / "out", "--dtype", dtype, "--runs", "1") == 0
    state = cut(toy("sd15"), PruningPlan.load(tmp_path / "out")).state_dict()
    assert all(value.equal(state[key]) for key, value in load_model(tmp_path / "out").state_dict().items())


def test_one_file_of_the_original_layout(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    config = str(diffaccel.zoo.path("emoji-sd"))
    assert pruned(saved / "original.safetensors", tmp_path / "out", "--config", config) == 0
    assert tree(tmp_path / "tmp") == {}  # what was unpacked is gone
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len(pipe("a red heart", num_inference_steps=1, output_type="latent").images) == 1
    assert pruned("emoji-sd", tmp_path / "folder") == 0
    plans = [PruningPlan.load(tmp_path / folder / "unet") for folder in ("out", "folder")]
    assert plans[0].removed == plans[1].removed


def test_pruned_again(saved: Path, tmp_path: Path) -> None:
    assert pruned(saved / "sd3", tmp_path / "one") == 0
    assert pruned(tmp_path / "one", tmp_path / "two", "--kinds", "both") == 0
    costs = [
        macs(model, **example_inputs(model))
        for model in map(denoiser, (saved / "sd3", tmp_path / "one", tmp_path / "two"))
    ]
    assert costs[2] <= 0.8 * costs[1] <= 0.64 * costs[0]
    assert (tmp_path / "two" / "transformer" / "pruning_plan.1.json").is_file()


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
    "a size of shards": ("sd", ("--max-shard-size", "abc"), "abc"),
    "a size": ("sd", ("--size", "0"), "size 0x0 does not fit"),
    "runs": ("sd", ("--runs", "-1"), "runs >= 1"),
    "a seed": ("sd", ("--seed", "-1", "--criterion", "random"), "non-negative"),
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
        ("diffusers.UNet2DConditionModel.save_pretrained", KeyboardInterrupt(), 130, "interrupted"),
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
    assert pruned(saved / "sd", tmp_path / "a" / "out") == status
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
