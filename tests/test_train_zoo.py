"""The recipe of the zoo: growth keeps the function, a stopped run goes on, and the result opens in diffusers."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

RECIPE = Path(__file__).parents[1] / "examples" / "train_zoo"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports the recipe's modules by name, and forgets them and their plain names afterwards."""
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == RECIPE:
            del sys.modules[name]


def _arguments(output: Path, *arguments: str) -> list[str]:
    return [*arguments, "--data", "synthetic", "--preset", "tiny", "--output_dir", str(output)]


def _steps(output: Path, stage: str) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in (output / "checkpoints" / stage).glob("step-*")]


def _random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Fresh biases and norms are zeros and ones, which would hide a mix-up."""
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def _unet(layers: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 12, 16),
        layers_per_block=layers,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 3)])
def test_growing_a_unet_keeps_its_function(recipe: Callable[[str], ModuleType], before: int, after: int) -> None:
    torch.manual_seed(0)
    old = _random_weights(_unet(before))
    new = recipe("grow").grow_unet(old, after).eval()
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected, actual = old(*inputs).sample, new(*inputs).sample
    assert new.config.layers_per_block == after
    assert new.num_parameters() > old.num_parameters()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_new_layers_of_a_grown_unet_learn(recipe: Callable[[str], ModuleType]) -> None:
    new = recipe("grow").grow_unet(_random_weights(_unet(1)), 2)
    new(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 3, 8)).sample.square().sum().backward()
    assert new.down_blocks[1].resnets[1].conv2.weight.grad.abs().sum() > 0
    assert new.up_blocks[0].attentions[1].proj_out.weight.grad.abs().sum() > 0


def test_growing_a_vae_keeps_its_function(recipe: Callable[[str], ModuleType]) -> None:
    torch.manual_seed(0)
    old = _random_weights(
        AutoencoderKL(
            sample_size=32,
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            mid_block_add_attention=False,
        )
    )
    new = recipe("grow").grow_vae(old, 3).eval()
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, actual = old(pictures).sample, new(pictures).sample
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_wrong_place_for_a_layer_is_noticed(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    grow = recipe("grow")

    def next_to_the_first(_old: int, _new: int) -> Callable[[str, int], int | None]:
        """Shapes agree, but the second layer of an up block meets the skip of the first."""
        return lambda block, index: ({0: 0, 1: 1, 3: 2} if block == "up_blocks" else {0: 0, 1: 1}).get(index)

    monkeypatch.setattr(grow, "unet_position", next_to_the_first)
    with pytest.raises(AssertionError, match="growth changed the function"):
        grow.grow_unet(_random_weights(_unet(2)), 3)


def test_emoji_job_makes_a_pipeline_and_a_second_round_starts_from_it(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train = recipe("train").main
    train(_arguments(first, "emoji", "--seconds", "60", "--steps", "3"))
    assert _steps(first, "vae") == _steps(first, "clip") == _steps(first, "unet") == [3]
    pipeline = StableDiffusionPipeline.from_pretrained(first / "emoji-sd").to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("thing number 1, random style", num_inference_steps=2, output_type="pt").images
    assert picture.shape[1] == 3
    assert (first / "emoji-clip" / "model.safetensors").exists()
    assert not any(str(tmp_path) in file.read_text() for file in (first / "emoji-sd").rglob("*.json"))

    train(_arguments(second, "emoji", "--seconds", "60", "--steps", "2", "--stages", "unet", "--init", str(first)))
    assert _steps(second, "unet") == [2]
    assert not (second / "checkpoints" / "vae").exists()
    weights = [load_file(out / "emoji-sd/vae/diffusion_pytorch_model.safetensors") for out in (first, second)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not any(str(tmp_path) in file.read_text() for file in (second / "emoji-sd").rglob("*.json"))


def test_a_killed_run_goes_on_at_its_last_step(
    recipe: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(tmp_path, "cifar_dit_s", "--seconds", "600")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, str(RECIPE / "train.py"), *arguments, "--save_every", "0"], env=environment
    )
    try:
        while not _steps(tmp_path, "cifar10-dit-s"):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    step = max(_steps(tmp_path, "cifar10-dit-s"))
    recipe("train").main([*arguments, "--steps", str(step + 2), "--resume"])
    assert f"resumed at step {step}," in capsys.readouterr().out
    assert _steps(tmp_path, "cifar10-dit-s") == [step + 2]


def _fit_line(fit: ModuleType, folder: Path, resume: bool, interrupt_after: int | None) -> torch.Tensor:
    """Six steps of a linear model on random batches; the averaged weight. The process may signal itself on the way."""
    torch.manual_seed(0)
    model, drawn = torch.nn.Linear(4, 1), 0

    def next_batch() -> tuple[torch.Tensor]:
        nonlocal drawn
        drawn += 1
        if drawn == interrupt_after:
            os.kill(os.getpid(), signal.SIGINT)
        return (torch.randn(8, 4),)

    def loss(network: torch.nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        return (network(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    config = fit.FitConfig(name="line", learning_rate=0.1, seconds=1e9, steps=6)
    return fit.fit(model, loss, next_batch, config, folder, resume, lambda _: None).weight


def test_a_run_stopped_by_ctrl_c_ends_where_an_unbroken_one_does(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    fit = recipe("fit")
    whole = _fit_line(fit, tmp_path / "whole", resume=False, interrupt_after=None)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"):
        _fit_line(fit, tmp_path / "broken", resume=False, interrupt_after=3)
    torch.testing.assert_close(
        _fit_line(fit, tmp_path / "broken", resume=True, interrupt_after=None), whole, rtol=0, atol=0
    )
