"""Sizes, batches and speeds of a run: `cpu` (two cores, an hour), `gpu` (one large card) and `tiny` (tests)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PLAIN_DOWN, _CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_PLAIN_UP, _CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"


@dataclass(frozen=True)
class Preset:
    """One row of settings.

    Attributes:
        styles: Emoji styles that are trained on.
        skin_tones: Train on the skin-tone variants too.
        layers: Layers a block, of VAE and U-Net.
        norm_groups: Groups of every group norm.
        vae_channels: Channels of the VAE's three levels.
        text_width: Width of both CLIP towers and of the U-Net's cross-attention.
        text_layers: Layers of the text tower.
        vision_layers: Layers of the vision tower.
        unet_channels: Channels of the U-Net's levels.
        unet_attention: For each level, whether it attends to the caption.
        vae_batch: Pictures a VAE step.
        clip_batch: Pairs a CLIP step.
        unet_batch: Latents a U-Net step.
        cifar_batch: Pictures a CIFAR-10 step.
        latent_copies: Augmented latents a picture that the U-Net is trained on.
        shares: Shares of the time budget of the stages vae, clip and unet.
        mixed_precision: bfloat16 autocast.
        compile: Use `torch.compile`.
    """

    styles: tuple[str, ...]
    skin_tones: bool
    layers: int
    norm_groups: int
    vae_channels: tuple[int, ...]
    text_width: int
    text_layers: int
    vision_layers: int
    unet_channels: tuple[int, ...]
    unet_attention: tuple[bool, ...]
    vae_batch: int
    clip_batch: int
    unet_batch: int
    cifar_batch: int
    latent_copies: int
    shares: dict[str, float]
    mixed_precision: bool
    compile: bool = False

    def unet_config(self) -> dict[str, Any]:
        """Keyword arguments of `UNet2DConditionModel` for 16x16 latents of 4 channels."""
        return {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": self.text_width,
            "attention_head_dim": 4,
            "norm_num_groups": self.norm_groups,
            "layers_per_block": self.layers,
            "block_out_channels": self.unet_channels,
            "down_block_types": tuple(_CROSS_DOWN if cross else _PLAIN_DOWN for cross in self.unet_attention),
            "up_block_types": tuple(_CROSS_UP if cross else _PLAIN_UP for cross in reversed(self.unet_attention)),
        }

    def vae_config(self) -> dict[str, Any]:
        """Keyword arguments of `AutoencoderKL` for 64x64 pictures: 4 latent channels, a quarter of the size."""
        return {
            "sample_size": 64,
            "latent_channels": 4,
            "block_out_channels": self.vae_channels,
            "layers_per_block": self.layers,
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "norm_num_groups": self.norm_groups,
            "mid_block_add_attention": False,
        }


PRESETS = {
    "gpu": Preset(
        styles=("twemoji", "noto"),
        skin_tones=True,
        layers=2,
        norm_groups=16,
        vae_channels=(48, 96, 128),
        text_width=192,
        text_layers=4,
        vision_layers=6,
        unet_channels=(96, 160, 192),
        unet_attention=(True, True, False),
        vae_batch=256,
        clip_batch=1024,
        unet_batch=512,
        cifar_batch=512,
        latent_copies=24,
        shares={"vae": 0.16, "clip": 0.14, "unet": 0.70},
        mixed_precision=True,
        compile=True,
    ),
    "cpu": Preset(
        styles=("twemoji",),
        skin_tones=False,
        layers=2,
        norm_groups=16,
        vae_channels=(32, 64, 64),
        text_width=128,
        text_layers=3,
        vision_layers=4,
        unet_channels=(64, 96, 128),
        unet_attention=(False, True, True),
        vae_batch=16,
        clip_batch=256,
        unet_batch=64,
        cifar_batch=64,
        latent_copies=6,
        shares={"vae": 0.24, "clip": 0.09, "unet": 0.67},
        mixed_precision=True,
    ),
    "tiny": Preset(
        styles=("twemoji",),
        skin_tones=False,
        layers=1,
        norm_groups=4,
        vae_channels=(4, 8, 8),
        text_width=16,
        text_layers=1,
        vision_layers=1,
        unet_channels=(8, 16),
        unet_attention=(False, True),
        vae_batch=2,
        clip_batch=4,
        unet_batch=4,
        cifar_batch=4,
        latent_copies=1,
        shares={"vae": 0.4, "clip": 0.2, "unet": 0.4},
        mixed_precision=False,
    ),
}
