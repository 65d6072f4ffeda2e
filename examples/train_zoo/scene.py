"""Train `emoji-scene-256`: 256x256 pictures of two to seven emoji on white, from captions that list them.

    python examples/train_zoo/scene.py --data DATA --output_dir OUT --seconds 2820    # OUT/emoji-scene-256

A `StableDiffusionPipeline` with 64x64 latents, large enough that an edit of a part can pay. VAE, tokenizer and noise
schedule are those of `emoji-sd`. Training goes on from its U-Net, which is convolutional and knows single emoji at this
scale, and from its text encoder, which must learn lists. First the collages are drawn and encoded (they are kept in
OUT/collages.safetensors; this time does not count as training). Noise has a random offset for each channel of a
picture: else the mean of 4,096 values tells how full the picture is even at the last timestep, and the network would
believe the mean of the noise that sampling starts from. Ctrl-C saves and stops; the same command with `--resume` goes
on.
"""

# diffusers and torch annotate models, configs and outputs too loosely for these checks.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from captions import tokens
from data import load_emoji, synthetic_emoji
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from fit import FitConfig, fit
from pipeline import save_half
from presets import PRESETS
from run import SYNTHETIC
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel
from unet import NoiseLoss

from diffaccel import zoo

SIZE = 256
_TEXT = """apple, banana, cherries, carrot, corn, mushroom, pizza, fries, bread, cake, cookie, beer, sunflower, rose,
tulip, palm tree, cat, dog, pig, cow, rabbit, frog, bear, monkey, whale, fish, bird, bee, spider, crab, heart,
green heart, blue heart, star, crescent moon, rainbow, cloud, umbrella, snowman, fire, bus, taxi, train, truck,
airplane, boat, rocket, bicycle, basketball, soccer"""
NAMES = _TEXT.replace("\n", " ").split(", ")
_COUNT = (2, 7)
_EMOJI_SIZE = (48, 80)  # about what `emoji-sd` has seen
_LISTINGS = 3  # captions of a collage, each with its names in another order
_DROPPED_CAPTIONS = 0.1
_NOISE_OFFSET = 0.1
_BATCH = 4
_ENCODED = 16  # pictures that the VAE encodes at once


def vocabulary(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Pictures of the emoji in scenes, uint8 (n, 3, 64, 64), and their names.

    They are few and unlike each other, since training is short; seven names fit the text encoder's 24 tokens.
    """
    preset = PRESETS["cpu"]
    data = load_emoji(folder, preset)
    meta = json.loads((folder / "emoji_meta.json").read_text())
    kept = [i for i, (style, _, tone) in enumerate(meta["keys"]) if style in preset.styles and not tone]
    first = {name: index for index, row in reversed([*enumerate(kept)]) for name in meta["captions"][row]}
    names = [name for name in NAMES if name in first]
    return data.images[[first[name] for name in names]], names


def places(count: int) -> list[tuple[int, int, int]]:
    """(left, top, size) of up to `count` squares in the picture that touch each other's margin at most."""
    found: list[tuple[int, int, int]] = []
    for _ in range(20 * count):
        size = random.randint(*_EMOJI_SIZE)
        left, top = random.randint(0, SIZE - size), random.randint(0, SIZE - size)
        apart = (
            max(left - (x + s), x - (left + size), top - (y + s), y - (top + size)) > -0.08 * min(s, size)
            for x, y, s in found
        )
        if all(apart):
            found.append((left, top, size))
        if len(found) == count:
            break
    return found


def collage(emoji: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, list[str]]:
    """A random picture, float32 (3, 256, 256) in [-1, 1], and its captions: "fish, rose and bus".

    The ground is white, because the VAE of `emoji-sd` knows no other (it whitens a pale one). Emoji are multiplied onto
    it, so that the white corners of one do not cover another.
    """
    picture = torch.ones(3, SIZE, SIZE)
    spots = places(random.randint(*_COUNT))
    drawn = random.sample(range(len(names)), len(spots))
    for index, (left, top, size) in zip(drawn, spots, strict=True):
        scaled = functional.interpolate(emoji[index][None] / 255, (size, size), mode="bicubic", antialias=True)[0]
        picture[:, top : top + size, left : left + size] *= scaled.clamp(0, 1)
    return picture * 2 - 1, [caption([names[i] for i in random.sample(drawn, len(drawn))]) for _ in range(_LISTINGS)]


def caption(names: list[str]) -> str:
    """The names as a list in words."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@torch.no_grad()
def encoded_collages(
    pipe: StableDiffusionPipeline, emoji: torch.Tensor, names: list[str], count: int
) -> dict[str, torch.Tensor]:
    """`latents`, scaled float16 (count, 4, 64, 64), and `tokens` of their captions, (count, 3, 24)."""
    latents, ids = [], []
    vae = pipe.vae.to(memory_format=torch.channels_last)
    for start in range(0, count, _ENCODED):
        made = [collage(emoji, names) for _ in range(min(_ENCODED, count - start))]
        pictures = torch.stack([picture for picture, _ in made]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            sample = vae.encode(pictures).latent_dist.sample()
        latents.append((sample.float() * vae.config.scaling_factor).half())
        ids.append(torch.stack([tokens(pipe.tokenizer, listed) for _, listed in made]))
        if start % (32 * _ENCODED) == 0:
            print(f"[scene] {start} of {count} collages are encoded", flush=True)
    return {"latents": torch.cat(latents).contiguous(), "tokens": torch.cat(ids)}


class Scene(nn.Module):
    """Text encoder and U-Net as one network of (noised latents, timestep, token numbers)."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        """Take both from `pipe`, and tell the U-Net the size that it is trained at."""
        super().__init__()
        self.unet, self.text_encoder = pipe.unet.to(memory_format=torch.channels_last), pipe.text_encoder
        self.unet.register_to_config(sample_size=SIZE // pipe.vae_scale_factor)

    def forward(self, noised: torch.Tensor, time: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The predicted noise."""
        return self.unet(noised, time, self.text_encoder(ids).last_hidden_state).sample


class SceneLoss(NoiseLoss):
    """Squared error of the noise that a `Scene` predicts, with high noise drawn more often and weighted more.

    What is where is decided at high noise, and that is what `emoji-sd` does not know. The weight SNR^-1/2 lies between
    those of a network that predicts noise, 1, and one that predicts the picture, 1 / SNR. The noise of each channel has
    an offset (Guttenberg 2023).
    """

    def __init__(self) -> None:
        """Precompute the schedule."""
        super().__init__(torch.device("cpu"))
        self._weight = self._noise / self._signal

    def times(self, count: int, device: torch.device) -> torch.Tensor:
        """Timesteps of a batch: twice as many at 1000 as at 500."""
        even = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        return (even.sqrt() * len(self._weight)).long().clamp(max=len(self._weight) - 1)

    def __call__(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Loss of (latents, token numbers)."""
        latents, ids = batch
        time = self.times(len(latents), latents.device)
        noise = torch.randn_like(latents) + _NOISE_OFFSET * torch.randn(*latents.shape[:2], 1, 1)
        noised = self._signal[time, None, None, None] * latents + self._noise[time, None, None, None] * noise
        error = model(noised.contiguous(memory_format=torch.channels_last), time, ids).float() - noise
        return (error.square().mean((1, 2, 3)) * self._weight[time]).mean()


def batches(collages: dict[str, torch.Tensor], empty: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Draws random batches of (latents, token numbers), a tenth of them with `empty`, the tokens of no caption."""

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        index, listing = torch.randint(len(collages["latents"]), (_BATCH,)), torch.randint(_LISTINGS, (_BATCH,))
        dropped = torch.rand(_BATCH, 1) < _DROPPED_CAPTIONS
        return collages["latents"][index].float(), torch.where(dropped, empty, collages["tokens"][index, listing])

    return next_batch


def save_shared(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write what the scene shares with `emoji-sd`, so that the folder is a whole pipeline."""
    for part in ("vae", "tokenizer", "scheduler"):
        shutil.copytree(zoo.path("emoji-sd") / part, folder / part, dirs_exist_ok=True)
    pipe.save_config(folder)


def main(arguments: list[str] | None = None) -> None:
    """Train the networks of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help=f"folder that prepare.py wrote, or '{SYNTHETIC}'")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="wall-clock budget of the training")
    parser.add_argument("--steps", type=int, help="also end after so many steps")
    parser.add_argument("--collages", type=int, default=2048, help="pictures that are drawn and encoded")
    parser.add_argument("--init", type=Path, help="folder with the unet and text_encoder of an earlier run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    random.seed(0)
    pipe = zoo.load("emoji-sd")
    if options.init:
        pipe.unet = UNet2DConditionModel.from_pretrained(options.init / "unet").float()
        pipe.text_encoder = CLIPTextModel.from_pretrained(options.init / "text_encoder").float()
    folder = options.output_dir / "emoji-scene-256"
    cache = options.output_dir / "collages.safetensors"
    if not (options.resume and cache.exists()):
        if options.data == SYNTHETIC:
            emoji, names = synthetic_emoji().images, [f"thing {i}" for i in range(len(synthetic_emoji()))]
        else:
            emoji, names = vocabulary(Path(options.data))
        options.output_dir.mkdir(parents=True, exist_ok=True)
        print(f"[scene] {len(names)} emoji", flush=True)
        made = encoded_collages(pipe, emoji, names, options.collages)
        save_file(made, cache.with_suffix(".partial"))
        cache.with_suffix(".partial").replace(cache)
    save_shared(pipe, folder)
    scene = Scene(pipe).train()
    scene.requires_grad_(True)

    def export(model: Scene) -> None:
        save_half(model.unet, folder / "unet")
        save_half(model.text_encoder, folder / "text_encoder")

    config = FitConfig(
        name="scene",
        learning_rate=5e-4,
        seconds=options.seconds,
        steps=options.steps,
        ema_decay=0.997,
        mixed_precision=True,
    )
    next_batch = batches(load_file(cache), tokens(pipe.tokenizer, [""]))
    fit(scene, SceneLoss(), next_batch, config, options.output_dir / "checkpoints", options.resume, export)


if __name__ == "__main__":
    main()
