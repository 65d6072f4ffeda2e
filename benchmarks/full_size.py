"""Networks of full size with random weights: the architectures that people use; their weights are not to be had."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from diffaccel.pruning.structure import build

DIT_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART = {"caption_channels": 4096, "sample_size": 128, "use_additional_conditions": True}
SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
FLUX = {"guidance_embeds": True}

ARCHITECTURES: dict[str, tuple[str, type, dict[str, Any]]] = {
    "sd15": ("SD 1.5", diffusers.UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768}),
    "sdxl": ("SDXL", diffusers.UNet2DConditionModel, SDXL),
    "dit": ("DiT-XL/2", diffusers.DiTTransformer2DModel, DIT_XL),
    "pixart": ("PixArt-alpha 1024", diffusers.PixArtTransformer2DModel, PIXART),
    "sd3": ("SD3-medium", diffusers.SD3Transformer2DModel, SD3),
    "flux-2+4": (
        "Flux.1-dev, 2 + 4 blocks",
        diffusers.FluxTransformer2DModel,
        FLUX | {"num_layers": 2, "num_single_layers": 4},
    ),
    "flux": ("Flux.1-dev", diffusers.FluxTransformer2DModel, FLUX),
}


def shapes(name: str) -> Any:
    """The network on the `meta` device: no weights."""
    _, kind, config = ARCHITECTURES[name]
    with torch.device("meta"):
        return kind(**config).eval()


def random_network(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The network with random weights that keep the size of what goes through; without a detour over float32."""
    _, kind, config = ARCHITECTURES[name]
    model: Any = build(kind, config)
    draw = torch.Generator().manual_seed(0)
    state = {}
    for key, value in model.state_dict().items():
        if not value.is_meta:
            state[key] = value.to(dtype)
        elif value.ndim > 1:
            state[key] = torch.empty(value.shape, dtype=dtype).normal_(std=value[0].numel() ** -0.5, generator=draw)
        else:  # norms near 1, biases near 0
            centre = 1.0 if key.endswith("weight") else 0.0
            state[key] = torch.empty(value.shape, dtype=dtype).normal_(centre, 0.1, generator=draw)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
