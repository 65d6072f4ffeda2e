"""Video models: SVD (VP in EDM's clock), Wan and HunyuanVideo (flow)."""

from __future__ import annotations

import diffusers
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.tiny import parts
from tests.tiny.run import SD_BETAS, SIZE, Toy, assemble, noise, seeded


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
    pipe = assemble(
        diffusers.StableVideoDiffusionPipeline,
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
    return pipe, {"image": image, "height": SIZE, "width": SIZE, "num_frames": 2, "output_type": "latent"}


@seeded
def wan() -> Toy:
    """Wan 2.1 with the scheduler config of its checkpoints; no VAE, its factors are 8 in space and 4 in time.

    Guidance is two calls of the network, not one of two rows.
    """
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipe = assemble(diffusers.WanPipeline, transformer=parts.smooth_in_time(transformer), scheduler=scheduler)
    return pipe, {
        **parts.prompt(),
        "height": 8 * SIZE,
        "width": 8 * SIZE,
        "num_frames": 5,
        "output_type": "latent",
    }


@seeded
def hunyuan_video() -> Toy:
    """HunyuanVideo; no VAE, its factors are 8 in space and 4 in time. Guidance is a number the network is told."""
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )
    pipe = assemble(
        diffusers.HunyuanVideoPipeline,
        transformer=parts.smooth_in_time(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    return pipe, {
        "prompt_embeds": noise(1, 4, 8, seed=2),
        "pooled_prompt_embeds": noise(1, 8, seed=4),
        "prompt_attention_mask": torch.ones(1, 4),
        "height": 8 * SIZE,
        "width": 8 * SIZE,
        "num_frames": 5,
        "output_type": "latent",
    }
