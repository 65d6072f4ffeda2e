"""Toy networks of every class that can be pruned, with weights and biases that matter."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

UNET = {"sample_size": 16, "block_out_channels": (16, 32), "norm_num_groups": 4, "attention_head_dim": 4}
CONDITION = UNET | {"cross_attention_dim": 8}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 20}
DIT = {"num_attention_heads": 4, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "sample_size": 8}
JOINT = {"attention_head_dim": 4, "num_attention_heads": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8}


def unconditional(**config: Any) -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(**{**UNET, **blocks, "layers_per_block": 2, **config})


def resampling() -> nn.Module:
    """ResNets that resample, scale and shift by time, and divide their output."""
    types = {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    }
    return unconditional(**types, resnet_time_scale_shift="scale_shift", mid_block_scale_factor=1.5)


def sd15(**config: Any) -> nn.Module:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**{**CONDITION, **blocks, "layers_per_block": 2, **config})


def deep_sd15() -> nn.Module:
    return sd15(layers_per_block=3)


def sdxl() -> nn.Module:
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return sd15(**blocks, **SDXL, transformer_layers_per_block=(1, 3), use_linear_projection=True)


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(**DIT, num_layers=3, norm_num_groups=4, num_embeds_ada_norm=10)


def shared_dit() -> nn.Module:
    """As converted checkpoints: every block has the same embedder."""
    return dit()


def pixart() -> nn.Module:
    text = {"cross_attention_dim": 16, "caption_channels": 8, "use_additional_conditions": False}
    return diffusers.PixArtTransformer2DModel(**DIT, **text, num_layers=3)


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        **JOINT, sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=4, caption_projection_dim=16
    )


def sd35() -> nn.Module:
    """Dual attention in the first blocks, and norms of queries and keys."""
    return diffusers.SD3Transformer2DModel(
        **JOINT,
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        caption_projection_dim=16,
        dual_attention_layers=(0, 1, 3),
        qk_norm="rms_norm",
    )


def flux() -> nn.Module:
    sizes = JOINT | {"attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}
    return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=3, num_single_layers=3, **sizes)


MAKERS = (unconditional, resampling, sd15, deep_sd15, sdxl, dit, shared_dit, pixart, sd3, sd35, flux)
TOYS = {maker.__name__: maker for maker in MAKERS}


def toy(name: str) -> Any:
    """A network in float32, eval mode, whose biases and norms are not the neutral ones of a fresh network."""
    torch.manual_seed(0)
    model = TOYS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.4)
    if name == "shared_dit":
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()
