"""Networks that do not belong together are refused in one sentence, and nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

import diffaccel
from diffaccel.samplers.policy.hook import NAME
from tests.policy import KINDS, denoiser, like, smaller, toy
from tests.tiny import SD_BETAS, draw

SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 20}


def refused(pipe: Any, small: Any, kind: type[Exception], *parts: str) -> None:
    with pytest.raises(kind) as error:
        diffaccel.stitch(pipe, small)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert all(part in sentence for part in parts), sentence
    registry = vars(denoiser(pipe)).get("_diffusers_hook")  # Flux and Wan leave one of Diffusers' own after a run
    assert registry is None or NAME not in registry.hooks
    assert "forward" not in vars(denoiser(pipe))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sd", {"in_channels": 9}),
        ("sd", {"out_channels": 8}),
        ("sd", {"cross_attention_dim": 16}),
        ("sd", {"time_cond_proj_dim": 8}),
        ("sd", {"num_class_embeds": 5}),
        ("sd", SDXL),
        ("sdxl", {"projection_class_embeddings_input_dim": 24}),
        ("dit", {"num_embeds_ada_norm": 10}),
        ("pixart", {"caption_channels": 16}),
        ("sd3", {"joint_attention_dim": 16}),
        ("sd3", {"pooled_projection_dim": 16}),
        ("flux", {"guidance_embeds": True}),
        ("flux", {"in_channels": 8}),
    ],
    ids=str,
)
def test_other_shapes_of_latents_or_conditioning(name, config):
    pipe, _ = toy(name)
    key = next(iter(config))
    refused(pipe, like(denoiser(pipe), **config), ValueError, "do not fit", key, "must share latents and conditioning")


@pytest.mark.parametrize("name", KINDS)
def test_smaller_ones_fit(name):
    """PixArt's `cross_attention_dim` is its width, and no property of the text."""
    pipe, _ = toy(name)
    diffaccel.stitch(pipe, smaller(pipe)).remove()


def test_latents_of_another_size():
    pipe, _ = toy("dit")
    refused(pipe, like(pipe.transformer, sample_size=16), ValueError, "latents with a side of 8 and of 16")


def test_larger_table_of_positions_is_no_hindrance():
    pipe, _ = toy("sd3")
    diffaccel.stitch(pipe, like(pipe.transformer, pos_embed_max_size=128)).remove()


def test_other_class_or_no_network():
    pipe, _ = toy("sd")
    refused(pipe, toy("pixart")[0].transformer, TypeError, "a PixArtTransformer2DModel cannot stand in for a UNet2D")
    refused(pipe, pipe.unet, ValueError, "the small network is the pipeline's own")
    refused(pipe, torch.compile(pipe.unet, backend="eager"), ValueError, "the small network is the pipeline's own")
    for wrong in ("nota-ai/bk-sdm-tiny", None, 3):
        refused(pipe, wrong, TypeError, "a network or a pipeline that has one, not a " + type(wrong).__name__)
    refused(pipe, torch.nn.Linear(1, 1), TypeError, "a Linear cannot stand in")


def other(pipe: Any, scheduler: Any = None, **parts: Any) -> Any:
    """Another pipeline of this kind."""
    new = copy.copy(pipe)
    new.register_modules(unet=smaller(pipe), scheduler=scheduler or pipe.scheduler, **parts)
    return new


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        (
            diffusers.DDIMScheduler(**SD_BETAS, prediction_type="v_prediction"),
            "epsilon, the small one v_prediction",
        ),
        (diffusers.DDIMScheduler(beta_schedule="linear"), "different noise schedules (betas)"),
        (diffusers.DDIMScheduler(**SD_BETAS, rescale_betas_zero_snr=True), "different noise schedules (betas)"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "predict"),
        (diffusers.EDMEulerScheduler(prediction_type="epsilon"), "noise schedules are on the vp and the ve path"),
    ],
)
def test_trained_for_another_prediction_or_schedule(scheduler, sentence):
    pipe, _ = toy("sd")
    refused(pipe, other(pipe, scheduler), ValueError, "do not fit", sentence)


@pytest.mark.parametrize("kind", ["EulerDiscrete", "DPMSolverMultistep", "PNDM", "LCM", "DDPM", "TCD"])
def test_another_sampler_is_no_other_schedule(kind):
    pipe, call = toy("sd")
    small = other(pipe, getattr(diffusers, f"{kind}Scheduler")(**SD_BETAS, steps_offset=0))
    with diffaccel.stitch(pipe, small):
        draw((pipe, call), pipe.scheduler, 2)


def text_encoder(seed: int, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return CLIPTextModel(CLIPTextConfig(**{**sizes, "vocab_size": 16, "max_position_embeddings": 4, **config}))


def test_text_encoders():
    """Of other sizes or other weights they are refused; rounded to float16, shared or absent they are not."""
    pipe, _ = toy("sd")
    own = text_encoder(0)
    pipe.register_modules(text_encoder=own)
    hint = "pass its network alone (other.unet)"
    refused(pipe, other(pipe, text_encoder=text_encoder(0, num_hidden_layers=2)), ValueError, "(text_encoder)", hint)
    refused(pipe, other(pipe, text_encoder=text_encoder(1)), ValueError, "text encoders (text_encoder) differ by", hint)
    for fits in (own, None, copy.deepcopy(own).half()):
        diffaccel.stitch(pipe, other(pipe, text_encoder=fits)).remove()
    diffaccel.stitch(pipe, other(pipe, text_encoder=text_encoder(1)).unet).remove()


def test_pipelines_of_other_kinds():
    """Without a network, with two, and one that tells its network no timestep."""
    pipe, _ = toy("sd")
    refused(pipe, diffusers.AudioPipelineOutput(audios=np.zeros(1)), TypeError, "not a AudioPipelineOutput")
    empty = copy.copy(pipe)
    empty.unet = None
    with pytest.raises(TypeError, match="has no network"):
        diffaccel.stitch(empty, pipe.unet)
    with pytest.raises(TypeError, match="has no network"):
        diffaccel.stitch(pipe, empty)
    two, _ = toy("wan")
    two.register_modules(transformer_2=copy.deepcopy(two.transformer))
    refused(two, smaller(two), ValueError, "several denoisers (transformer, transformer_2); a policy is for one")


def test_adapter_that_only_one_has():
    pipe, _ = toy("sd")
    small = smaller(pipe)
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    refused(pipe, small, ValueError, "encoder_hid_dim_type is ip_image_proj in the pipeline's and None in")
