"""Stable Diffusion and its kind: U-Nets on VP paths, and one on a VE path."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.tiny import parts
from tests.tiny.run import SD_BETAS, SIZE, Toy, assemble, seeded


def _unet(**config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )


def _sd(pipeline: Any, **call: Any) -> Toy:
    pipe = assemble(
        pipeline,
        vae=parts.vae(),
        unet=_unet(),
        scheduler=diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, steps_offset=1),
        requires_safety_checker=False,
    )
    return pipe, {**parts.prompt(), "output_type": "latent", **call}


@seeded
def sd() -> Toy:
    return _sd(diffusers.StableDiffusionPipeline)


@seeded
def sd_img2img() -> Toy:
    return _sd(diffusers.StableDiffusionImg2ImgPipeline, **parts.picture())


@seeded
def sd_inpaint() -> Toy:
    return _sd(diffusers.StableDiffusionInpaintPipeline, **parts.masked_picture())


def _sdxl(pipeline: Any, scheduler: Any = None, **call: Any) -> Toy:
    pipe = assemble(
        pipeline,
        vae=parts.vae(),
        unet=_unet(
            addition_embed_type="text_time", addition_time_embed_dim=2, projection_class_embeddings_input_dim=20
        ),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**SD_BETAS),
        add_watermarker=False,
    )
    return pipe, {**parts.pooled_prompt(), "output_type": "latent", **call}


@seeded
def sdxl() -> Toy:
    return _sdxl(diffusers.StableDiffusionXLPipeline)


@seeded
def sdxl_img2img() -> Toy:
    return _sdxl(diffusers.StableDiffusionXLImg2ImgPipeline, **parts.picture())


@seeded
def sdxl_inpaint() -> Toy:
    return _sdxl(diffusers.StableDiffusionXLInpaintPipeline, **parts.masked_picture())


@seeded
def playground() -> Toy:
    """Playground v2.5: SDXL trained as EDM, a VE path with preconditioning; its scheduler's values are these."""
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    return _sdxl(diffusers.StableDiffusionXLPipeline, scheduler)
