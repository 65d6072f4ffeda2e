"""The CIFAR-10 jobs: an unconditional U-Net, two class-conditional DiTs, and a DiT of the flow-matching kind."""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, SchedulerMixin, UNet2DModel
from fit import Batch, fit
from PIL import Image
from pipeline import save_half
from presets import PRESETS
from run import SYNTHETIC, Run
from torch import nn
from torch.nn import functional

CLASSES = 10
_DROPPED_LABELS = 0.1
_RATE = 6e-4
_DIT_SIZES = {"b": {"num_attention_heads": 4, "num_layers": 10}, "s": {"num_attention_heads": 2, "num_layers": 6}}


def load_cifar(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, uint8 (N, 3, 32, 32), and labels (N,), on the run's device."""
    if run.data == SYNTHETIC:
        images, labels = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % CLASSES
        return images.to(run.device), labels.to(run.device)
    folder = Path(run.data)
    Image.MAX_IMAGE_PIXELS = None  # a file holds 10,000 pictures, one a row
    rows = [np.asarray(Image.open(file))[..., :3] for file in sorted(folder.glob("cifar_[1-5].png"))]
    images = torch.from_numpy(np.concatenate([part.reshape(-1, 32, 32, 3) for part in rows]))
    labels = torch.tensor(json.loads((folder / "train_labels.json").read_text()))[: len(images)]
    return images.permute(0, 3, 1, 2).contiguous().to(run.device), labels.to(run.device)


def _batches(run: Run) -> Callable[[], Batch]:
    """Random batches of (pictures in [-1, 1], half of them mirrored; labels)."""
    images, labels = load_cifar(run)

    def next_batch() -> Batch:
        index = torch.randint(len(images), (run.preset.cifar_batch,), device=run.device)
        pictures = images[index].float() / 127.5 - 1
        mirrored = torch.rand(len(index), 1, 1, 1, device=run.device) < 0.5
        return torch.where(mirrored, pictures.flip(-1), pictures), labels[index]

    return next_batch


def _schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


class _Noising:
    """Adds the noise of a random timestep of the linear schedule."""

    def __init__(self, device: torch.device) -> None:
        self._kept = _schedule().alphas_cumprod.to(device)

    def __call__(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        time = torch.randint(len(self._kept), (len(pictures),), device=pictures.device)
        kept, noise = self._kept[time, None, None, None], torch.randn_like(pictures)
        return kept.sqrt() * pictures + (1 - kept).sqrt() * noise, time, noise


def _drop_labels(labels: torch.Tensor) -> torch.Tensor:
    """A tenth of the labels becomes the extra class, which stands for "no class" in classifier-free guidance."""
    dropped = torch.rand(len(labels), device=labels.device) < _DROPPED_LABELS
    return torch.where(dropped, CLASSES, labels)


def _build_unet(tiny: bool) -> UNet2DModel:
    channels = (8, 8, 8, 8) if tiny else (96, 160, 160, 192)
    return UNet2DModel(
        sample_size=32,
        layers_per_block=1 if tiny else 2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8 if tiny else 40,
        norm_num_groups=4 if tiny else 32,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def _build_dit(size: str, tiny: bool) -> DiTTransformer2DModel:
    shape = {"num_attention_heads": 1, "num_layers": 1} if tiny else _DIT_SIZES[size]
    model = DiTTransformer2DModel(
        attention_head_dim=16 if tiny else 64,
        in_channels=3,
        out_channels=3,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
        **shape,
    )
    # Every block embeds the label itself and would drop it by its own dice; `_drop_labels` decides once for all.
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0
    return model


def _train(run: Run, name: str, part: str, model: nn.Module, loss: Callable, scheduler: SchedulerMixin) -> None:
    """Fit the model and save it as OUT/NAME/PART, with its scheduler beside it."""
    folder = run.output / name / part
    earlier = run.started_from(f"{name}/{part}")
    if earlier is not None:
        model.load_state_dict(type(model).from_pretrained(earlier).float().state_dict())
    scheduler.save_pretrained(run.output / name / "scheduler")
    config = run.fit_config(name, _RATE, run.seconds, ema_decay=0.9998, warmup_steps=300)
    model = model.to(run.device, memory_format=torch.channels_last).train()
    print(f"[{name}] {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    fit(model, loss, _batches(run), config, run.checkpoints, run.resume, partial(save_half, folder=folder))


def train_unet(run: Run) -> None:
    """Unconditional U-Net, predicting the noise: `cifar10-ddpm/unet`."""
    noising = _Noising(run.device)

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        noised, time, noise = noising(batch[0])
        prediction = model(noised.contiguous(memory_format=torch.channels_last), time).sample
        return functional.mse_loss(prediction.float(), noise)

    _train(run, "cifar10-ddpm", "unet", _build_unet(run.preset is PRESETS["tiny"]), loss, _schedule())


def train_dit(run: Run, size: str) -> None:
    """Class-conditional DiT of size `b` or `s`, predicting the noise: `cifar10-dit-SIZE/transformer`."""
    noising = _Noising(run.device)

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        noised, time, noise = noising(batch[0])
        prediction = model(noised, timestep=time, class_labels=_drop_labels(batch[1])).sample
        return functional.mse_loss(prediction.float(), noise)

    model = _build_dit(size, run.preset is PRESETS["tiny"])
    _train(run, f"cifar10-dit-{size}", "transformer", model, loss, _schedule())


def train_flow(run: Run) -> None:
    """Class-conditional DiT, predicting the velocity of a straight path to noise: `cifar10-flow-dit/transformer`."""

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        pictures, labels = batch
        noise = torch.randn_like(pictures)
        sigma = torch.randn(len(noise), device=noise.device).sigmoid()[:, None, None, None]  # logit-normal, as in SD3
        mixed = (1 - sigma) * pictures + sigma * noise
        prediction = model(mixed, timestep=sigma.flatten() * 1000, class_labels=_drop_labels(labels)).sample
        return functional.mse_loss(prediction.float(), noise - pictures)

    model = _build_dit("b", run.preset is PRESETS["tiny"])
    _train(run, "cifar10-flow-dit", "transformer", model, loss, FlowMatchEulerDiscreteScheduler())


CIFAR_JOBS: dict[str, Callable[[Run], None]] = {
    "cifar_unet": train_unet,
    "cifar_dit_b": partial(train_dit, size="b"),
    "cifar_dit_s": partial(train_dit, size="s"),
    "cifar_flow": train_flow,
}
