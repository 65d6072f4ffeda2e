"""Train a small partner of `emoji-sd` by distillation, for the first steps of a trajectory (T-Stitch).

    python examples/train_zoo/partner.py --data DATA --output_dir OUT --seconds 2400    # OUT/emoji-sd-small/unet

The small U-Net has half the channels and one layer a block, 28 % of the MACs. It learns what `emoji-sd` predicts for
noised latents of the training pictures, with their captions and without. The squared difference of the two predictions
is weighted by how much an error moves the end of a trajectory (`diffaccel.pruning.influence`), and high noise is drawn
more often: the partner makes the first steps. `--init` goes on from weights that an earlier run saved. Ctrl-C saves and
stops; the same command with `--resume` goes on.
"""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from data import load_emoji, synthetic_emoji
from diffusers import UNet2DConditionModel
from fit import FitConfig, fit
from pipeline import save_half, training_schedule
from presets import PRESETS
from run import SYNTHETIC
from torch import nn
from unet import NoiseLoss, captioned_latents

from diffaccel import zoo
from diffaccel.pruning.influence import influence

_BATCH = 64
_INFLUENCE = (0.1, 5.0)  # bounds of the weights: the network stays usable at little noise


def build_small(large: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net that takes and gives what `large` does, with narrower stages of one layer."""
    small = {"block_out_channels": (32, 64, 96), "layers_per_block": 1}
    return UNet2DConditionModel.from_config({**large.config, **small})


class DistillationLoss(NoiseLoss):
    """`NoiseLoss` with the prediction of a teacher in place of the noise, and weights for the first steps."""

    def __init__(self, teacher: nn.Module) -> None:
        """`teacher` is called without gradients."""
        super().__init__(torch.device("cpu"))
        self._teacher = teacher.eval().requires_grad_(False)
        steps = len(self._weight)
        moved = torch.from_numpy(influence(training_schedule(), range(steps - 1, -1, -1))).flip(0).float()
        self._weight = moved.clamp(*_INFLUENCE)

    def times(self, count: int, device: torch.device) -> torch.Tensor:
        """Timesteps of a batch: twice as many at 1000 as at 500."""
        even = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        return (even.sqrt() * len(self._weight)).long().clamp(max=len(self._weight) - 1)

    def target(self, noised: torch.Tensor, time: torch.Tensor, text: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the teacher predicts."""
        return self._teacher(noised, time, text).sample


def main(arguments: list[str] | None = None) -> None:
    """Train the network of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=f"folder that prepare.py wrote, or '{SYNTHETIC}'")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="wall-clock budget of the training")
    parser.add_argument("--steps", type=int, help="also end after so many steps")
    parser.add_argument("--init", type=Path, help="folder of a U-Net to start from")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    preset, synthetic = PRESETS["cpu"], options.data == SYNTHETIC
    data = synthetic_emoji() if synthetic else load_emoji(Path(options.data), preset)
    pipe = zoo.load("emoji-sd")
    _, next_batch = captioned_latents(pipe, data, 1 if synthetic else preset.latent_copies, _BATCH)
    small = UNet2DConditionModel.from_pretrained(options.init).float() if options.init else build_small(pipe.unet)
    small = small.to(memory_format=torch.channels_last)
    print(f"[small] {small.num_parameters() / 1e6:.2f} M parameters", flush=True)
    config = FitConfig(
        name="small",
        learning_rate=1e-3 if options.init else 1.5e-3,
        seconds=options.seconds,
        steps=options.steps,
        ema_decay=0.9985,
    )
    loss = DistillationLoss(pipe.unet.to(memory_format=torch.channels_last))
    save = partial(save_half, folder=options.output_dir / "emoji-sd-small/unet")
    fit(small, loss, next_batch, config, options.output_dir / "checkpoints", options.resume, save)


if __name__ == "__main__":
    main()
