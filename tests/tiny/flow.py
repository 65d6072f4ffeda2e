"""Flow-matching image models: SD3, Flux and Sana."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.tiny import parts
from tests.tiny.run import SIZE, Toy, assemble, noise, seeded


def _sd3(pipeline: Any, channels: int = 4, **call: Any) -> Toy:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=8,
        pooled_projection_dim=8,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = parts.flow_vae(channels)
    pipe = assemble(pipeline, transformer=transformer, vae=vae, scheduler=scheduler)
    return pipe, {**parts.pooled_prompt(), "output_type": "latent", **call}


@seeded
def sd3() -> Toy:
    return _sd3(diffusers.StableDiffusion3Pipeline)


@seeded
def sd3_img2img() -> Toy:
    return _sd3(diffusers.StableDiffusion3Img2ImgPipeline, **parts.picture())


@seeded
def sd3_inpaint() -> Toy:
    """With 16 channels: by that number the pipeline tells a network that sees no mask."""
    return _sd3(diffusers.StableDiffusion3InpaintPipeline, 16, **parts.masked_picture())


def _flux(pipeline: Any, **call: Any) -> Toy:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = assemble(pipeline, transformer=transformer, vae=parts.flow_vae(4), scheduler=scheduler)
    return pipe, {
        "prompt_embeds": noise(1, 4, 8, seed=2),
        "pooled_prompt_embeds": noise(1, 8, seed=4),
        "height": SIZE,
        "width": SIZE,
        "output_type": "latent",
        **call,
    }


@seeded
def flux() -> Toy:
    return _flux(diffusers.FluxPipeline)


@seeded
def flux_img2img() -> Toy:
    return _flux(diffusers.FluxImg2ImgPipeline, **parts.picture())


@seeded
def flux_inpaint() -> Toy:
    return _flux(diffusers.FluxInpaintPipeline, **parts.masked_picture())


@seeded
def sana() -> Toy:
    """Sana with the scheduler config of its checkpoints; the VAE of the real one is not built, it divides by 32."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=SIZE,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipe = assemble(diffusers.SanaPipeline, transformer=parts.smooth_in_time(transformer), scheduler=scheduler)
    return pipe, {
        "negative_prompt": None,
        **parts.prompt(),
        **parts.attention_masks(),
        "height": 32 * SIZE,
        "width": 32 * SIZE,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
