"""Random networks of a few thousand weights inside the real pipelines, and what a test asks of a picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = 8  # pictures and latents: the VAE below does not downsample
Toy = tuple[Any, dict[str, Any]]  # pipeline, arguments of its call


def relative(a: Tensor, b: Tensor) -> float:
    """Root mean square of a - b, over that of b; nan if either is not finite."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def draw(toy: Toy, scheduler: Any, steps: int, **call: Any) -> Tensor:
    """Picture (or latents, where the pipeline returns them) of `toy` with `scheduler`, from seed 0."""
    pipe, arguments = toy
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # DiTPipeline does not hand its generator on to the scheduler
        images = pipe(num_inference_steps=steps, **{"generator": generator, **arguments, **call})[0]
    return torch.as_tensor(images)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], Toy]) -> Callable[[], Toy]:
    """Build once, from a fixed seed and without touching the global generator; each call gives back its scheduler."""

    @cache
    def built() -> tuple[Any, dict[str, Any], Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe, call = build()
        return pipe, call, pipe.scheduler

    @wraps(build)
    def toy() -> Toy:
        pipe, call, scheduler = built()
        pipe.scheduler = scheduler
        return pipe, dict(call)

    return toy


def _unet(in_channels: int = 4, **config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=in_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )


def _vae(channels: int = 4, **config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, **config)


def _flow_vae(channels: int) -> diffusers.AutoencoderKL:
    return _vae(channels, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)


def _picture() -> dict[str, Any]:
    return {"image": noise(1, 3, SIZE, SIZE, seed=1).sigmoid(), "strength": 0.6}


def _sd(pipeline: Any, in_channels: int = 4, **call: Any) -> Toy:
    pipe = pipeline(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=_unet(in_channels),
        scheduler=diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipe), {
        "prompt_embeds": noise(1, 4, 8, seed=2),
        "negative_prompt_embeds": noise(1, 4, 8, seed=3),
        "guidance_scale": 3.0,
        "output_type": "latent",
        **call,
    }


@seeded
def sd() -> Toy:
    return _sd(diffusers.StableDiffusionPipeline)


@seeded
def sd_img2img() -> Toy:
    return _sd(diffusers.StableDiffusionImg2ImgPipeline, **_picture())


@seeded
def sd_inpaint() -> Toy:
    """Inpainting with a plain U-Net: the known half is noised anew after each step."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1
    return _sd(diffusers.StableDiffusionInpaintPipeline, mask_image=mask, height=SIZE, width=SIZE, **_picture())


@seeded
def sdxl() -> Toy:
    unet = _unet(addition_embed_type="text_time", addition_time_embed_dim=2, projection_class_embeddings_input_dim=20)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SD_BETAS),
        add_watermarker=False,
    )
    return _ready(pipe), {
        "prompt_embeds": noise(1, 4, 8, seed=2),
        "negative_prompt_embeds": noise(1, 4, 8, seed=3),
        "pooled_prompt_embeds": noise(1, 8, seed=4),
        "negative_pooled_prompt_embeds": noise(1, 8, seed=5),
        "guidance_scale": 3.0,
        "output_type": "latent",
    }


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
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=_vae(), scheduler=scheduler)
    return _ready(pipe), {"class_labels": [3], "output_type": "np"}


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
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=_vae(), transformer=transformer, scheduler=scheduler
    )
    return _ready(pipe), {
        "negative_prompt": None,
        "prompt_embeds": noise(1, 4, 8, seed=2),
        "negative_prompt_embeds": noise(1, 4, 8, seed=3),
        "prompt_attention_mask": torch.ones(1, 4),
        "negative_prompt_attention_mask": torch.ones(1, 4),
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "output_type": "latent",
    }


def _sd3(pipeline: Any, **call: Any) -> Toy:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=8,
        pooled_projection_dim=8,
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = pipeline(transformer=transformer, vae=_flow_vae(4), scheduler=scheduler, **dict.fromkeys(names))
    return _ready(pipe), {
        "prompt_embeds": noise(1, 4, 8, seed=2),
        "negative_prompt_embeds": noise(1, 4, 8, seed=3),
        "pooled_prompt_embeds": noise(1, 8, seed=4),
        "negative_pooled_prompt_embeds": noise(1, 8, seed=5),
        "guidance_scale": 3.0,
        "output_type": "latent",
        **call,
    }


@seeded
def sd3() -> Toy:
    return _sd3(diffusers.StableDiffusion3Pipeline)


@seeded
def sd3_img2img() -> Toy:
    return _sd3(diffusers.StableDiffusion3Img2ImgPipeline, **_picture())


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
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = pipeline(transformer=transformer, vae=_flow_vae(4), scheduler=scheduler, **dict.fromkeys(names))
    return _ready(pipe), {
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
    return _flux(diffusers.FluxImg2ImgPipeline, **_picture())


@seeded
def svd() -> Toy:
    """Stable Video Diffusion: a VP network in EDM's clock, driven with VE samples by its own Euler scheduler."""
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIZE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=2,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        num_frames=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=4
    )
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,), latent_channels=4),
        image_encoder=CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(
            **SD_BETAS,
            prediction_type="v_prediction",
            timestep_type="continuous",
            timestep_spacing="leading",
            steps_offset=1,
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=SIZE, size=SIZE),
    )
    image = noise(1, 3, SIZE, SIZE, seed=1).sigmoid()
    return _ready(pipe), {"image": image, "height": SIZE, "width": SIZE, "num_frames": 2, "output_type": "latent"}


def _ready(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # DiT drops class labels at random otherwise
    pipe.set_progress_bar_config(disable=True)
    return pipe
