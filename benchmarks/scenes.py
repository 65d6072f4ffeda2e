"""`emoji-scene-256`: a text-to-image pipeline with 64x64 latents, for edits of a part of a picture.

    python benchmarks/scenes.py PICTURE.png    # draws the captions below

Captions list two to seven of the 50 things in `examples/train_zoo/scene.py`: "cat, heart and pizza".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

import diffaccel
from diffaccel import zoo
from diffaccel.pictures import labelled_grid, save_picture

FOLDER = Path(__file__).parent / "weights" / "emoji-scene-256"
CAPTIONS = (
    "cat, heart and pizza",
    "dog, apple and fish",
    "rainbow, sunflower and frog",
    "rocket, crescent moon and star",
    "bus, taxi, truck and bicycle",
    "frog, tulip, cherries and bee",
    "whale and boat",
    "bear, cake, green heart, banana and soccer",
)


def load(folder: Path = FOLDER, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The pipeline: U-Net and text encoder from `folder`; VAE, tokenizer and scheduler are those of `emoji-sd`.

    Args:
        folder: holds `unet` and `text_encoder`, such as the output of `examples/train_zoo/scene.py`.
        dtype: of all weights; they are stored in float16.
    """
    with zoo.quiet_loading():
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_pretrained(folder / "unet", dtype=dtype),
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
        }
        return StableDiffusionPipeline.from_pretrained(zoo.path("emoji-sd"), **parts, dtype=dtype)


def main() -> None:
    """Draw the captions, with two seeds each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    pipe: Any = load(args.folder)
    pipe.scheduler = diffaccel.scheduler("er_ode_1_corrected", pipe, schedule="beta", final="sigma_min")
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for seed in range(2):
        noise = [torch.Generator().manual_seed(seed * len(CAPTIONS) + i) for i in range(len(CAPTIONS))]
        call = {"guidance_scale": args.guidance, "num_inference_steps": args.steps, "generator": noise}
        rows.append(pipe(list(CAPTIONS), **call).images)
    labels = [text.replace(", ", "\n").replace(" and ", "\n") for text in CAPTIONS]
    save_picture(labelled_grid(rows, ["seed 0", "seed 1"], labels, cell=192), args.picture)


if __name__ == "__main__":
    main()
