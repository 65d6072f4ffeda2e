"""`diffaccel prune`: every toy pipeline, what it prints and writes; bad input gets a sentence and leaves nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import diffaccel
from diffaccel.cli import main
from diffaccel.cost import macs, parameters
from diffaccel.pruning import PruningPlan, cut, example_inputs, find_groups, load_model
from tests.pruning.sources import PIPELINES, pruned, tree
from tests.pruning.toys import toy


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


@pytest.mark.parametrize("kinds", ["both", "heads, neurons", "mid_block,layer,resnet"])
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
    assert main(["prune", str(saved / "dit"), "--target", "0.8", "--dry-run", "--device", "cpu", *output]) == 0
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
    assert pruned(saved / "dit", tmp_path / "out") == 0
    assert pruned(saved / "dit", tmp_path / "two", "--prompts", str(saved / "classes.txt")) == 2


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_not_rounded_to_the_type_of_the_computation(saved: Path, tmp_path: Path, dtype: str) -> None:
    assert pruned(saved / "dit", tmp_path / "out", "--dtype", dtype, "--runs", "1") == 0
    state = cut(denoiser(saved / "dit"), PruningPlan.load(tmp_path / "out" / "transformer")).state_dict()
    assert all(value.equal(state[key]) for key, value in denoiser(tmp_path / "out").state_dict().items())


@pytest.mark.slow
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
