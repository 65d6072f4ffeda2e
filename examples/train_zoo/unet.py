"""The U-Net stage: predict the noise in latents of augmented pictures, given a caption's embedding."""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from captions import CaptionTable, tokens
from data import Emoji, augment
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from fit import FitConfig, fit
from grow import grow_unet
from pipeline import training_schedule
from presets import Preset
from run import Run
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

_DROPPED_CAPTIONS = 0.1
_UNCHANGED = 1 / 3
_SNR_LIMIT = 5.0


def build_unet(preset: Preset, init: Path | None) -> UNet2DConditionModel:
    """A new U-Net in float32, or the one in the folder `init`, grown to the preset's layers a block."""
    if init is None:
        return UNet2DConditionModel(**preset.unet_config())
    return grow_unet(UNet2DConditionModel.from_pretrained(init).float(), preset.layers)


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, data: Emoji, copies: int, mixed_precision: bool, batch: int = 128) -> torch.Tensor:
    """Scaled float16 latents of every picture, (1 + copies, N, 4, 16, 16): as it is first, then augmented copies."""
    vae = vae.to(memory_format=torch.channels_last)
    pool = []
    for copy in range(1 + copies):
        for start in range(0, len(data), batch):
            pictures = data.pictures(slice(start, start + batch))
            pictures = (augment(pictures) if copy else pictures).contiguous(memory_format=torch.channels_last)
            with torch.autocast(pictures.device.type, torch.bfloat16, enabled=mixed_precision):
                latents = vae.encode(pictures).latent_dist.sample()
            pool.append((latents.float() * vae.config.scaling_factor).half())
    return torch.cat(pool).unflatten(0, (1 + copies, len(data)))


def captioned_latents(
    pipe: StableDiffusionPipeline, data: Emoji, copies: int, batch: int
) -> tuple[torch.Tensor, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """The latent pool of a trained pipeline, and random batches of (latents, text embeddings), a tenth without text."""
    pool = latent_pool(pipe.vae, data, copies, mixed_precision=False)
    captions = CaptionTable.of(data.captions, pipe.tokenizer, torch.device("cpu")).embedded(pipe.text_encoder)
    with torch.no_grad():
        empty = pipe.text_encoder(tokens(pipe.tokenizer, [""])).last_hidden_state.half()

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        copy, picture = torch.randint(len(pool), (batch,)), torch.randint(len(data), (batch,))
        dropped = torch.rand(batch, 1, 1) < _DROPPED_CAPTIONS
        return pool[copy, picture].float(), torch.where(dropped, empty, captions.draw(picture)).float()

    return pool, next_batch


def spread_timesteps(count: int, steps: int, device: torch.device) -> torch.Tensor:
    """Random timesteps, one in each of `count` equal parts of [0, steps): each uniform, the batch evenly spread."""
    return ((torch.arange(count, device=device) + torch.rand(count, device=device)) * (steps / count)).long()


class NoiseLoss:
    """Squared error of the predicted noise, weighted by min(SNR, 5) / SNR (Hang et al. 2023, "Min-SNR").

    Without the weight, most of the gradient comes from almost clean latents, where only fine texture is left to learn.
    """

    def __init__(self, device: torch.device) -> None:
        """Precompute the schedule on `device`."""
        kept = training_schedule().alphas_cumprod.to(device)
        self._signal, self._noise = kept.sqrt(), (1 - kept).sqrt()
        snr = kept / (1 - kept)
        self._weight = snr.clamp(max=_SNR_LIMIT) / snr

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of (latents, text embeddings) at fresh random timesteps and noise."""
        latents, text = batch
        time = self.times(len(latents), latents.device)
        noise = torch.randn_like(latents)
        noised = self._signal[time, None, None, None] * latents + self._noise[time, None, None, None] * noise
        noised = noised.contiguous(memory_format=torch.channels_last)
        error = model(noised, time, text).sample.float() - self.target(noised, time, text, noise)
        return (error.square().mean((1, 2, 3)) * self._weight[time]).mean()

    def times(self, count: int, device: torch.device) -> torch.Tensor:
        """Timesteps of a batch, evenly spread."""
        return spread_timesteps(count, len(self._weight), device)

    def target(self, noised: torch.Tensor, time: torch.Tensor, text: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model is to predict: the noise."""
        return noise


def train_unet(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    data: Emoji,
    run: Run,
    config: FitConfig,
    export: Callable[[UNet2DConditionModel], None],
) -> UNet2DConditionModel:
    """Train the U-Net on a pool of latents, a tenth without a caption; return the averaged model."""
    device = data.images.device
    embeddings = CaptionTable.of(data.captions, tokenizer, device).embedded(encoder)
    with torch.no_grad():
        empty = encoder(tokens(tokenizer, [""]).to(device)).last_hidden_state.half()
    pool = latent_pool(vae, data, run.preset.latent_copies, run.preset.mixed_precision)
    print(
        f"[{config.name}] {unet.num_parameters() / 1e6:.2f} M parameters, {pool.shape[0]}x{pool.shape[1]} latents "
        f"of standard deviation {pool.float().std():.3f}",
        flush=True,
    )

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        picture = torch.randint(len(data), (run.preset.unet_batch,), device=device)
        copy = torch.randint(1, len(pool), (run.preset.unet_batch,), device=device)
        copy[torch.rand(run.preset.unet_batch, device=device) < _UNCHANGED] = 0
        dropped = torch.rand(run.preset.unet_batch, 1, 1, device=device) < _DROPPED_CAPTIONS
        return pool[copy, picture].float(), torch.where(dropped, empty, embeddings.draw(picture)).float()

    model = unet.to(memory_format=torch.channels_last)
    return fit(model, NoiseLoss(device), next_batch, config, run.checkpoints, run.resume, export)
