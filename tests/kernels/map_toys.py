"""Small networks of maps, their inputs, and one way to call them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

import diffaccel
from diffaccel.kernels import Handle, SparseEditConfig, apply_sparse_edit

Inputs = dict[str, Any]


def sd(**config: Any) -> Any:
    defaults: dict[str, Any] = {
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**(defaults | config))


def sdxl() -> Any:
    return sd(
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=20,
    )


def ddpm(**config: Any) -> Any:
    defaults: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "downsample_padding": 0,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**(defaults | config))


def ddpm_resnet() -> Any:
    """ResNets halve and double; the embedding scales and shifts."""
    return ddpm(downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift")


def controlnet() -> Any:
    net: Any = diffusers.ControlNetModel(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8, 8, 8),
    )
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        nn.init.normal_(layer.weight, std=0.2)  # zero in a new network
    return net


def decoder() -> Any:
    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return diffusers.AutoencoderKL(**config).decoder


def emoji() -> Any:
    return diffaccel.zoo.load("emoji-sd").unet


BUILD: dict[str, Callable[[], Any]] = {
    "emoji": emoji,
    "sd": sd,
    "sdxl": sdxl,
    "ddpm": ddpm,
    "ddpm_resnet": ddpm_resnet,
    "decoder": decoder,
}


def toy(name: str) -> Any:
    torch.manual_seed(0)
    return BUILD[name]().eval()


def inputs(name: str, size: tuple[int, int] = (32, 24), batch: int = 2, seed: int = 0) -> Inputs:
    """Everything but the time depends on the seed."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x: Inputs = {"sample": randn(batch, 4, *size)}
    if name in ("ddpm", "ddpm_resnet"):
        return x | {"timestep": torch.tensor(500)}
    if name == "decoder":
        return x
    x |= {"timestep": torch.tensor(500), "encoder_hidden_states": randn(batch, 5, 128 if name == "emoji" else 8)}
    if name == "sdxl":
        x["added_cond_kwargs"] = {"text_embeds": randn(batch, 8), "time_ids": torch.arange(6.0).repeat(batch, 1)}
    return x


def changed(given: Inputs, mask: np.ndarray, seed: int = 1) -> Inputs:
    """The same with other numbers in the mask."""
    x = given["sample"]
    new = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return given | {"sample": torch.where(torch.from_numpy(mask), new.to(x), x)}


def call(network: Any, given: Inputs) -> Tensor:
    with torch.no_grad():
        out = network(**given)
    return out if isinstance(out, Tensor) else out.sample


def recorded(network: Any, given: Inputs, maps: bool = True, **config: Any) -> tuple[Handle, Tensor]:
    handle = apply_sparse_edit(network, SparseEditConfig(**config), maps=maps)
    with handle.record():
        out = call(network, given)
    return handle, out


def edited(handle: Handle, mask: Any, given: Inputs, key: Any = 0) -> Tensor:
    with handle.edit(mask, key):
        return call(handle.network, given)


def square(size: tuple[int, int], top: int, left: int, side: int = 4) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def error(new: Tensor, true: Tensor, where: Any = None) -> float:
    """Relative RMSE, where a mask says so."""
    if where is not None:
        where = torch.as_tensor(where)
        new, true = new[..., where], true[..., where]
    return float((new.double() - true.double()).norm() / true.double().norm())
