"""The recipes of the pairs: they run on random data, and what they leave opens in Diffusers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from diffaccel import zoo
from diffaccel.samplers.policy.compatible import check_network

RECIPE = Path(__file__).parents[2] / "examples" / "train_zoo"


def run(*arguments: str) -> None:
    command = [sys.executable, str(RECIPE / arguments[0]), *arguments[1:], "--data", "synthetic"]
    subprocess.run([*command, "--seconds", "60", "--steps", "2"], check=True, capture_output=True)


def test_partner_fits_emoji_sd(tmp_path):
    run("partner.py", "--output_dir", str(tmp_path))
    small = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "emoji-sd-small" / "unet")
    check_network(zoo.load("emoji-sd"), small)
    assert list(small.config.block_out_channels) == [32, 64, 96]


@pytest.mark.parametrize("size", ["b", "s"])
def test_dit_opens_in_the_stock_pipeline(tmp_path, size):
    run("dit.py", size, "--output_dir", str(tmp_path))
    folder = tmp_path / f"emoji-dit-{size}"
    names = json.loads((folder / "model_index.json").read_text())["id2label"]
    assert names["0"] == "thing number 0"
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32).eval()
    pipe = diffusers.DiTPipeline(transformer, zoo.load("emoji-sd").vae, zoo.load("emoji-sd").scheduler, names)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(class_labels=[3], num_inference_steps=2, guidance_scale=4.0, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
