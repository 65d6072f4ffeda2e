"""The VAE stage: pictures of 64x64 to latents of 16x16 with 4 channels, and back."""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from data import Emoji, augment
from diffusers import AutoencoderKL
from fit import FitConfig, fit
from grow import grow_vae
from presets import Preset
from run import Run
from torch import nn

_KL_WEIGHT = 2e-4


class _Reconstruction(nn.Module):
    """Encode, sample the posterior and decode in one forward pass, so that the whole of it can be compiled."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae: AutoencoderKL = vae

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(pictures).latent_dist
        sample = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        return self.vae.decode(sample).sample, posterior.mean, posterior.logvar


def _edges(error: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbours: of an error picture, how wrong the edges are."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def reconstruction_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """L1 + squared error + L1 of the gradients (for sharp edges) + a small KL term."""
    pictures = batch[0]
    decoded, mean, log_variance = (tensor.float() for tensor in model(pictures))
    error = decoded - pictures
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + error.square().mean() + 0.5 * _edges(error) + _KL_WEIGHT * divergence


@torch.no_grad()
def psnr(vae: AutoencoderKL, data: Emoji, count: int | None = None, batch: int = 128) -> float:
    """Peak signal-to-noise ratio in dB of the posterior mean's reconstruction of the first `count` pictures (or all).

    The squared error is averaged over all pictures before the logarithm, with values from -1 to 1.
    """
    total, count = 0.0, min(count or len(data), len(data))
    for start in range(0, count, batch):
        pictures = data.pictures(slice(start, min(start + batch, count)))
        decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        total += (decoded - pictures).square().mean().item() * len(pictures)
    return 10 * math.log10(4 * count / total)


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, data: Emoji, batch: int = 128) -> float:
    """The factor that brings the latents to unit variance, from every fourth picture."""
    pictures = data.pictures(slice(None, None, 4)).split(batch)
    means = [vae.encode(part).latent_dist.mean for part in pictures]
    return round(1 / torch.cat(means).std().item(), 5)


def build_vae(preset: Preset, init: Path | None) -> AutoencoderKL:
    """A new VAE in float32, or the one in the folder `init`, grown to the preset's layers a block."""
    if init is None:
        return AutoencoderKL(**preset.vae_config())
    return grow_vae(AutoencoderKL.from_pretrained(init).float(), preset.layers)


def train_vae(
    vae: AutoencoderKL,
    data: Emoji,
    run: Run,
    config: FitConfig,
    export: Callable[[AutoencoderKL], None],
) -> AutoencoderKL:
    """Train the VAE on augmented pictures and return the averaged model with its scaling factor set."""
    device = data.images.device

    def next_batch() -> tuple[torch.Tensor]:
        index = torch.randint(len(data), (run.preset.vae_batch,), device=device)
        return (augment(data.pictures(index)).contiguous(memory_format=torch.channels_last),)

    def finish(model: nn.Module) -> None:
        model.vae.register_to_config(scaling_factor=_scaling_factor(model.vae, data))
        export(model.vae)

    size, before = vae.num_parameters() / 1e6, psnr(vae, data, 512)
    print(f"[{config.name}] {size:.2f} M parameters, PSNR {before:.2f} dB on 512 pictures", flush=True)
    model = _Reconstruction(vae).to(memory_format=torch.channels_last)
    trained = fit(model, reconstruction_loss, next_batch, config, run.checkpoints, run.resume, finish).vae
    print(f"[{config.name}] PSNR {psnr(trained, data, 512):.2f} dB on 512 pictures", flush=True)
    return trained
