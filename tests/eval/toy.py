"""Toy pipelines that take prompts, a toy extractor, and a job of both that a test can start, share and kill."""

from __future__ import annotations

import argparse
import functools
import os
import signal
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from diffaccel import zoo
from diffaccel.eval import Extractor, Prompt, callable_extractor, extract, generate
from tests import tiny

PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(["a cat", "a red car", "the moon", "soup", "a bee"])]
SIZE = 8


@functools.cache
def _texts() -> dict[str, Any]:
    """Tokenizer and text encoders of a few thousand weights."""
    tokenizer = CLIPTokenizer.from_pretrained(zoo.path("emoji-sd") / "tokenizer")
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    words |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    clip = functools.partial(CLIPTextConfig, intermediate_size=8, **words, **layers)
    t5 = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        models = {
            "tokenizer": tokenizer,
            "clip8": CLIPTextModel(clip(hidden_size=8)),
            "plain": CLIPTextModel(clip(hidden_size=4)),
            "clip4": CLIPTextModelWithProjection(clip(hidden_size=4, projection_dim=4)),
            "clip4b": CLIPTextModelWithProjection(clip(hidden_size=4, projection_dim=4)),
            "wide": CLIPTextModelWithProjection(clip(hidden_size=4, projection_dim=8)),
            "t5": T5EncoderModel(t5),
        }
    for model in models.values():
        if isinstance(model, torch.nn.Module):
            for values in model.parameters():  # CLIP starts so small that all prompts are the same
                values.data.mul_(4)
            model.eval()
    return models


PARTS = {
    "sd": {"tokenizer": "tokenizer", "text_encoder": "clip8"},
    "sdxl": {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer", "text_encoder": "plain", "text_encoder_2": "wide"},
    "sd3": {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer", "text_encoder": "clip4", "text_encoder_2": "clip4b"},
    "flux": {"tokenizer": "tokenizer", "tokenizer_2": "tokenizer", "text_encoder": "clip8", "text_encoder_2": "t5"},
    "pixart": {"tokenizer": "tokenizer", "text_encoder": "t5"},
}
SQUARE = {"height": SIZE, "width": SIZE}
CALLS: dict[str, dict[str, Any]] = {
    "sd": {"guidance_scale": 3.0},
    "sdxl": {"guidance_scale": 3.0},
    "sd3": {"guidance_scale": 3.0},
    "flux": SQUARE,
    "pixart": {"use_resolution_binning": False, "clean_caption": False, **SQUARE},
}


def pipeline(kind: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of `tests.tiny` that reads prompts, and its call; the one of `tests.tiny` stays as it is."""
    base = getattr(tiny, kind)()[0]
    texts = {name: _texts()[part] for name, part in PARTS[kind].items()}
    extra = {"requires_safety_checker": False} if kind == "sd" else {}
    pipe = type(base)(**{**base.components, **texts}, **extra)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 2, **CALLS[kind]}


def ddpm() -> Any:
    """Unconditional, in pixels, with noise in every step: the smallest of all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=SIZE,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
        )
    return diffusers.DDPMPipeline(unet.eval(), diffusers.DDPMScheduler())


def extractor(name: str = "toy", factor: float = 1.0) -> Extractor:
    """Sines of random projections of the pixels."""
    weights = tiny.noise(3 * SIZE * SIZE, 6, seed=7) * factor

    def features(pixels: Tensor) -> Tensor:
        return (pixels.flatten(1) / 255 @ weights).sin()

    return callable_extractor(features, name=name, dim=6, size=SIZE)


def _die_at(module: Any, name: str, count: int) -> None:
    """Let the process be killed in the middle of the `count`-th call of a function."""
    whole, calls = getattr(module, name), 0

    def fragile(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    setattr(module, name, fragile)


def job(out: Path, num: int = 130) -> np.ndarray:
    """Pictures and their features, in shards of 64, 64 and 2."""
    generate(ddpm(), PROMPTS, out, num=num, batch=32, num_inference_steps=2, progress=False)
    return extract(out, extractor(), progress=False)["features"]


def main() -> None:
    """`python -m tests.eval.toy OUT [--die-in save|rename]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--die-in", choices=["save", "rename"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.die_in == "save":  # in the second shard of pictures, some of which are written
        from PIL import Image

        _die_at(Image.Image, "save", 64 + 20)
    if args.die_in == "rename":  # in the second shard of features, written and not yet renamed
        from diffaccel.eval import files

        _die_at(files.os, "replace", _renames(args.out) + 2)
    job(args.out)


def _renames(out: Path) -> int:
    """Renames that the rest of the pictures take: one a shard."""
    return 3 - len([shard for shard in (out / "images").iterdir() if shard.name[0] != "."])


if __name__ == "__main__":
    main()
