"""Train the "One More Step" network of `emoji-sd` (arXiv:2311.15744), which `diffaccel.starts.one_more_step` calls.

    python examples/train_zoo/oms.py --data DATA --output_dir OUT --seconds 900

psi(z0, caption) minimises E ||psi + x0||^2 over latents x0 and independent noise z0, so that -psi comes to be the mean
latent of the caption. A tenth of the captions is dropped, for guidance. The result is a `UNet2DConditionModel`, called
at timestep 0 only. Ctrl-C saves and stops; the same command with `--resume` goes on.
"""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from data import load_emoji, synthetic_emoji
from diffusers import UNet2DConditionModel
from fit import FitConfig, fit
from pipeline import save_half
from presets import PRESETS
from run import SYNTHETIC
from torch import nn
from unet import captioned_latents

from diffaccel import zoo

_BATCH = 64


def build_network(text_width: int) -> UNet2DConditionModel:
    """A U-Net for 16x16 latents of 4 channels; deep levels are wide, since what it draws is coarse."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def mean_loss(network: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Squared error of -psi(z0, caption) against the latents, at fresh noise z0."""
    latents, text = batch
    noise = torch.randn_like(latents).contiguous(memory_format=torch.channels_last)
    return (network(noise, 0, text).sample.float() + latents).square().mean()


def main(arguments: list[str] | None = None) -> None:
    """Train the network of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=f"folder that prepare.py wrote, or '{SYNTHETIC}'")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="wall-clock budget of the training")
    parser.add_argument("--steps", type=int, help="also end after so many steps")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    preset, synthetic = PRESETS["cpu"], options.data == SYNTHETIC
    data = synthetic_emoji() if synthetic else load_emoji(Path(options.data), preset)
    pipe = zoo.load("emoji-sd")
    pool, next_batch = captioned_latents(pipe, data, 1 if synthetic else preset.latent_copies, _BATCH)
    network = build_network(pipe.text_encoder.config.hidden_size).to(memory_format=torch.channels_last)
    spread = (pool.float() - pool.float().mean((0, 1))).square().mean()
    print(f"[oms] {network.num_parameters() / 1e6:.2f} M parameters; error of the mean latent {spread:.4f}", flush=True)
    config = FitConfig(name="oms", learning_rate=2e-3, seconds=options.seconds, steps=options.steps, ema_decay=0.998)
    save = partial(save_half, folder=options.output_dir / "emoji-oms")
    fit(network, mean_loss, next_batch, config, options.output_dir / "checkpoints", options.resume, save)


if __name__ == "__main__":
    main()
