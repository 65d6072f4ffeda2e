"""The training script on toy folders: what it trains, saves, resumes and refuses."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffaccel
from diffaccel import zoo
from diffaccel.samplers.policy.exits import DepthSchedule, layers
from tests.tiny import SD_BETAS, draw, noise, parts

SCRIPT = Path(__file__).parents[2] / "examples" / "train_early_exit.py"
CLASSES = 1000  # DiTPipeline's class for "none" is fixed


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_early_exit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses ask for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a DiTPipeline with three blocks."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 4, "num_layers": 3},
        **{"norm_num_groups": 4, "sample_size": 8, "num_embeds_ada_norm": CLASSES},
    )
    scheduler = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False)
    diffusers.DiTPipeline(transformer, parts.vae(), scheduler).save_pretrained(folder)
    return folder


def pictures(folder: Path, key: str, values: list[Any]) -> Path:
    folder.mkdir()
    for i in range(len(values)):
        Image.new("RGB", (9, 12), (40 * i, 80, 120)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", key: value}) for i, value in enumerate(values)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def arguments(dit, tmp_path) -> list[str]:
    data = pictures(tmp_path / "data", "label", [0, 5, 999])
    given = ["--pretrained_model_name_or_path", dit, "--train_data_dir", data, "--depths", 3, 2, 1]
    return [*map(str, given), "--train_batch_size", "8", "--learning_rate", "1e-3"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_what_it_saves(script, arguments, dit, tmp_path):
    out = tmp_path / "out"
    script.main([*arguments, "--output_dir", str(out), "--max_train_steps", "3"])
    assert json.loads((out / "depths.json").read_text()) == {"depths": [3, 2, 1]}
    before, after = weights(dit), weights(out)
    assert {value.dtype for value in after.values()} == {torch.float16}
    moved = {name: not torch.equal(value.half(), after[name]) for name, value in before.items()}
    assert not any(change for name, change in moved.items() if "timestep_embedder" in name)
    assert all(moved[f"transformer_blocks.{i}.attn1.to_q.weight"] for i in range(3))
    assert moved["proj_out_2.weight"]

    pipe = diffusers.DiTPipeline.from_pretrained(out, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with diffaccel.early_exit(pipe, json.loads((out / "depths.json").read_text())["depths"]) as handle:
        draw((pipe, {"class_labels": [3], "output_type": "np"}), pipe.scheduler, 6)
        assert set(handle.report().calls) == {"full", "depth 2", "depth 1"}
    assert sorted(path.name for path in out.glob(".*")) == []


def test_a_resumed_run_is_the_run(script, arguments, tmp_path, monkeypatch):
    """To the bit, with averaged weights and a learning rate that falls; the oldest checkpoints are deleted."""
    run = [*arguments, "--use_ema", "--lr_scheduler", "cosine", "--checkpointing_steps", "1", "--max_train_steps", "4"]
    whole, two = tmp_path / "whole", tmp_path / "two"
    script.main([*run, "--output_dir", str(whole)])
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    two.mkdir()
    (whole / "checkpoint-3").rename(two / "checkpoint-3")
    loss_of, calls = script.loss_of, []
    monkeypatch.setattr(script, "loss_of", lambda *args: calls.append(args) or loss_of(*args))
    script.main([*run, "--output_dir", str(two), "--resume_from_checkpoint", "latest"])
    assert len(calls) == 1
    expected, found = weights(whole), weights(two)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    plain = tmp_path / "plain"
    script.main([argument for argument in run if argument != "--use_ema"] + ["--output_dir", str(plain)])
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in expected.items())


def test_ctrl_c_saves_a_checkpoint(script, arguments, tmp_path, monkeypatch):
    loss_of, calls = script.loss_of, []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return loss_of(*args)

    monkeypatch.setattr(script, "loss_of", interrupted)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="stopped at step 2; go on with --resume_from_checkpoint latest"):
        script.main([*arguments, "--output_dir", str(out), "--max_train_seconds", "1000"])
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is before
    state = load_file(out / "checkpoint-2" / "model.safetensors")
    assert any("transformer_blocks.2" in name for name in state)


def test_it_stops_in_time(script, arguments, tmp_path):
    script.main([*arguments, "--output_dir", str(tmp_path / "out"), "--max_train_seconds", "0"])
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert (tmp_path / "out" / "checkpoint-0").is_dir()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_loss_is_that_of_the_prediction_type(script, kind):
    """A network that knows the clean picture makes no error."""
    schedule = diffusers.DDPMScheduler(**SD_BETAS, prediction_type=kind)
    clean = noise(5, 4, 8, 8)

    def right(noised: torch.Tensor, timestep: torch.Tensor, told: Any) -> torch.Tensor:
        a = schedule.alphas_cumprod[timestep].sqrt()[:, None, None, None]
        s = (1 - a**2).sqrt()
        eps = (noised - a * clean) / s
        return {"epsilon": eps, "v_prediction": a * eps - s * clean, "sample": clean}[kind]

    assert float(script.loss_of(right, None, schedule, clean, {})) < 1e-6
    wrong = script.loss_of(lambda *args: right(*args) + 2, None, schedule, clean, {})
    assert float(wrong) == pytest.approx(4, rel=1e-3)


def test_distillation_is_towards_the_whole_network(script, dit):
    network = diffusers.DiTTransformer2DModel.from_pretrained(dit / "transformer").eval()
    schedule = diffusers.DDPMScheduler(**SD_BETAS)
    told = {"class_labels": torch.arange(6)}
    whole, less = (script.Exits(network, DepthSchedule((depth,), layers(network))) for depth in (3, 1))
    with torch.no_grad():
        assert float(script.loss_of(whole, network, schedule, noise(6, 4, 8, 8), told)) == 0
        assert float(script.loss_of(less, network, schedule, noise(6, 4, 8, 8), told)) > 1e-4


def test_a_tenth_is_told_nothing(script, dit):
    network = diffusers.DiTTransformer2DModel.from_pretrained(dit / "transformer")
    torch.manual_seed(0)
    labels = script.labels_of([{"label": 3}, {"label": 4}], network, "cpu")(torch.arange(4000) % 2)["class_labels"]
    assert 0.08 < float((labels == CLASSES).float().mean()) < 0.12
    assert set(labels.tolist()) == {3, 4, CLASSES}
    assert not any(getattr(module, "dropout_prob", 0.0) for module in network.modules())

    pipe = zoo.load("emoji-sd")
    nothing, cat, dog = pipe.encode_prompt(["", "cat", "dog"], "cpu", 1, False)[0]
    given = script.texts_of([{"text": ["cat", "dog"]}], pipe, "cpu")(torch.zeros(1000, dtype=torch.long))
    embeds = given["encoder_hidden_states"]
    shares = [float((embeds - one).abs().amax((1, 2)).lt(1e-4).float().mean()) for one in (nothing, cat, dog)]
    assert sum(shares) == pytest.approx(1)
    assert 0.05 < shares[0] < 0.15 < 0.3 < min(shares[1:])


def test_latents_of_pictures(script, tmp_path):
    """Scaled and shifted as pipelines do, cut to squares, transparent ones on white."""
    red, white = (1.0, -1.0, -1.0), (1.0, 1.0, 1.0)
    Image.new("RGB", (8, 12), (255, 0, 0)).save(tmp_path / "0.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "1.png")
    vae = parts.vae()
    vae.register_to_config(scaling_factor=0.3, shift_factor=0.1)
    mean, std = script.encode_pictures(vae, [tmp_path / "0.png", tmp_path / "1.png"], 8)
    with torch.no_grad():
        expected = vae.encode(torch.tensor([red, white])[:, :, None, None].expand(2, 3, 8, 8)).latent_dist
    assert torch.allclose(mean, (expected.mean - 0.1) * 0.3, atol=1e-5)
    assert torch.allclose(std, expected.std * 0.3, atol=1e-5)


def test_command_line_with_stable_diffusion(tmp_path):
    data = pictures(tmp_path / "data", "text", ["red", ["blue", "sky"]])
    given = ["--pretrained_model_name_or_path", zoo.path("emoji-sd"), "--train_data_dir", data, "--output_dir", "out"]
    command = [sys.executable, SCRIPT, *given, "--depths", 3, 2, 1, "--max_train_steps", 2, "--train_batch_size", 3]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, check=True, timeout=300, capture_output=True, text=True)
    assert "step 2 loss" in done.stdout
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet.config.sample_size == 16


def test_refusals(script, arguments, dit, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    for wrong, message in (
        ([], "give --max_train_steps or --max_train_seconds"),
        (["--max_train_seconds", "1", "--lr_scheduler", "cosine"], "give --max_train_steps"),
    ):
        with pytest.raises(SystemExit):
            script.main([*arguments, *out, *wrong])
        assert message in capsys.readouterr().err
    steps = [*out, "--max_train_steps", "1"]
    with pytest.raises(ValueError, match="whole numbers from 1 to 3"):
        script.main([*arguments, *steps, "--depths", "4"])
    for values, key, message in (
        ([7, 1000], "label", "labels of this network are 0 to 999, not 7 to 1000"),
        (["cat"], "text", "has file_name and label, unlike"),
        ([], "label", "has file_name and label, unlike {}"),
    ):
        data = pictures(tmp_path / f"{key}{len(values)}", key, values)
        with pytest.raises(SystemExit, match=message):
            script.main([*arguments, *steps, "--train_data_dir", str(data)])
    with pytest.raises(SystemExit, match=r"no metadata.jsonl; write a line for each picture with file_name and label"):
        script.main([*arguments, *steps, "--train_data_dir", str(tmp_path)])
    assert not (tmp_path / "out").exists()
