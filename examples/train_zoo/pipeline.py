"""Saving in the layout of diffusers: single models in half precision, and the pipeline that ties them together."""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

_SHARD = "14MB"


def training_schedule() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, which the U-Net is trained on and sampled with."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_half(model: nn.Module, folder: Path) -> None:
    """Save a copy of a diffusers or transformers model in float16, in safetensors shards of at most 14 MB."""
    half = copy.deepcopy(model).to("cpu", torch.float16)
    half.save_pretrained(folder, max_shard_size=_SHARD)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # the folder on this machine that the weights once came from
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_pipeline(folder: Path) -> None:
    """Complete the `StableDiffusionPipeline` in `folder`, whose models and tokenizer are there already."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=training_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)
