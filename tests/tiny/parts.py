"""What the toy pipelines share: VAEs, prompts, a picture and a mask."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import TimestepEmbedding

from tests.tiny.run import SIZE, noise


def vae(channels: int = 4, **config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, **config)


def flow_vae(channels: int) -> diffusers.AutoencoderKL:
    return vae(channels, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)


def smooth_in_time(network: Any) -> Any:
    """`network`, deaf to the fast half of its time embedding, so that solvers converge as with trained weights.

    Random weights hear one timestep as loud as a hundred of them.
    """
    for module in network.modules():
        if isinstance(module, TimestepEmbedding):
            sines, cosines = module.linear_1.weight.data.chunk(2, dim=1)
            for half in (sines, cosines):
                half[:, : half.shape[1] // 2] = 0  # frequencies fall along it, from 1 to 1e-4 per timestep
    return network


def prompt() -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one, with guidance between them."""
    return {
        "prompt_embeds": noise(1, 4, 8, seed=2),
        "negative_prompt_embeds": noise(1, 4, 8, seed=3),
        "guidance_scale": 3.0,
    }


def pooled_prompt() -> dict[str, Any]:
    pooled = {"pooled_prompt_embeds": noise(1, 8, seed=4), "negative_pooled_prompt_embeds": noise(1, 8, seed=5)}
    return prompt() | pooled


def attention_masks() -> dict[str, Any]:
    """Of prompts without padding."""
    return {"prompt_attention_mask": torch.ones(1, 4), "negative_prompt_attention_mask": torch.ones(1, 4)}


def picture() -> dict[str, Any]:
    return {"image": noise(1, 3, SIZE, SIZE, seed=1).sigmoid(), "strength": 0.6}


def masked_picture() -> dict[str, Any]:
    """Inpainting with a network that sees no mask: the known half is noised anew after each step."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1
    return {"mask_image": mask, "height": SIZE, "width": SIZE, **picture()}
