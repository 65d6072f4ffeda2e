"""Diffusion transformers on VP paths."""

from __future__ import annotations

import diffusers

from tests.tiny import parts
from tests.tiny.run import SD_BETAS, SIZE, Toy, assemble, seeded


@seeded
def dit() -> Toy:
    """DiT with a learned variance, which schedulers without noise of their own leave out; it returns pictures only."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=SIZE,
        num_embeds_ada_norm=1000,
    )
    scheduler = diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False)
    pipe = assemble(diffusers.DiTPipeline, transformer=transformer, vae=parts.vae(), scheduler=scheduler)
    return pipe, {"class_labels": [3], "output_type": "np"}


@seeded
def pixart() -> Toy:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=SIZE,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = assemble(diffusers.PixArtAlphaPipeline, vae=parts.vae(), transformer=transformer, scheduler=scheduler)
    return pipe, {
        "negative_prompt": None,
        **parts.prompt(),
        **parts.attention_masks(),
        "use_resolution_binning": False,
        "output_type": "latent",
    }
