"""Measure a trained emoji pipeline: VAE, CLIP retrieval, and which guidance scale suits it.

    python examples/train_zoo/evaluate.py OUT/emoji-sd --clip OUT/emoji-clip --data DATA --preset cpu --grid grid.png

Prints one JSON object. All pictures are training pictures: there is no held-out set.
"""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from clip import caption_features, picture_features
from data import Emoji, load_emoji
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from presets import PRESETS
from transformers import CLIPModel, CLIPTokenizer
from vae import psnr

GRID_PROMPTS = (
    "heart",
    "smiling face with sunglasses",
    "blue book",
    "sunrise over mountains",
    "dog face",
    "norway flag",
    "red apple",
    "santa",
    "sleeping face",
    "crying face",
    "sunflower",
    "anchor",
)


def load_pipeline(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """The pipeline in float32 with DPM-Solver++(2M), silent."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(device, torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline, prompts: list[str], guidance: float, steps: int, batch: int = 32
) -> torch.Tensor:
    """Pictures in [-1, 1] on the CPU, (n, 3, 64, 64); prompt i always starts from the noise of seed i."""
    channels, size = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    noise = [torch.randn(channels, size, size, generator=torch.Generator().manual_seed(i)) for i in range(len(prompts))]
    parts = []
    for start in range(0, len(prompts), batch):
        latents = torch.stack(noise[start : start + batch]).to(pipeline.device)
        result = pipeline(
            prompts[start : start + batch],
            latents=latents,
            guidance_scale=guidance,
            num_inference_steps=steps,
            output_type="pt",
        )
        parts.append(result.images.float().cpu() * 2 - 1)
    return torch.cat(parts)


def recall(queries: torch.Tensor, keys: torch.Tensor, own: torch.Tensor) -> dict[str, float]:
    """Share of queries whose own key (index `own`, (n,)) is the nearest, or among the ten nearest, of all keys."""
    similarity = queries @ keys.T
    rank = (similarity > similarity.gather(1, own[:, None])).sum(1)
    return {"R@1": (rank < 1).float().mean().item(), "R@10": (rank < 10).float().mean().item()}


class Judge:
    """A CLIP model with the features of all captions and pictures of the data."""

    def __init__(self, folder: Path, data: Emoji) -> None:
        """Load the model and embed the first caption ("NAME, STYLE style") and the picture of every emoji."""
        self._clip = CLIPModel.from_pretrained(folder).float().eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        self._captions = caption_features(self._clip, tokenizer, [few[0] for few in data.captions])
        self._pictures = picture_features(self._clip, data.pictures(slice(None)))

    def retrieval(self) -> dict[str, float]:
        """Recall of the caption of each true picture among all captions."""
        return recall(self._pictures, self._captions, torch.arange(len(self._captions)))

    def judge(self, generated: torch.Tensor, index: torch.Tensor) -> dict[str, float]:
        """Measure pictures generated for the emoji `index`.

        Text similarity and recall are against the captions; picture similarity is to the true picture.
        """
        features = picture_features(self._clip, generated)
        return {
            "text_similarity": (features * self._captions[index]).sum(1).mean().item(),
            "picture_similarity": (features * self._pictures[index]).sum(1).mean().item(),
            **recall(features, self._captions, index),
        }


def save_grid(pictures: torch.Tensor, path: Path, columns: int = 6, zoom: int = 2) -> None:
    """Save pictures in [-1, 1], (n, 3, 64, 64), as one PNG."""
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    sheet = torch.cat(rows, dim=1).add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    image = Image.fromarray(sheet.numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC).save(path)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All measures of one pipeline as plain numbers."""
    data = load_emoji(options.data, PRESETS[options.preset])
    pipeline = load_pipeline(options.pipeline, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    judge = Judge(options.clip, data)
    if options.grid:
        prompts = [f"{prompt}, twemoji style" for prompt in GRID_PROMPTS]
        save_grid(generate(pipeline, prompts, 4.0, options.steps), options.grid)
    index = torch.linspace(0, len(data) - 1, options.prompts).round().long()
    prompts = [data.captions[i][0] for i in index]
    vae = pipeline.vae.to("cpu")
    report: dict[str, object] = {
        "vae_psnr_first_512": psnr(vae, data, 512),
        "vae_psnr_all": psnr(vae, data),
        "clip_retrieval": judge.retrieval(),
        "true_pictures": judge.judge(data.pictures(index), index),
    }
    pipeline.vae.to(pipeline.unet.device)
    for scale in options.scales:
        report[f"cfg_{scale:g}"] = judge.judge(generate(pipeline, prompts, scale, options.steps), index)
    return report


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="which pictures and captions to use")
    parser.add_argument("--prompts", type=int, default=200, help="captions a guidance scale, spread over the data")
    parser.add_argument("--scales", type=float, nargs="*", default=[2, 3, 4, 5, 7.5])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--grid", type=Path, help="also save 12 samples at guidance 4 as this PNG")
    print(json.dumps(measure(parser.parse_args(arguments)), indent=1))


if __name__ == "__main__":
    main()
