"""Does "One More Step" help emoji-sd? Brightness and colour of pictures with and without it, against the data's.

    python examples/train_zoo/prepare.py DATA --only emoji
    python benchmarks/starts.py --data DATA

writes results/starts_emoji-sd_cfg4.md. The prompts are those of prompts.txt that name a picture of the training set.
All starts share their noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

import diffaccel
from diffaccel import zoo
from diffaccel.eval.fidelity import clip_distance, paired_interval
from diffaccel.eval.reference import pair_generator, weights_hash
from diffaccel.pictures import save_text
from diffaccel.starts import one_more_step

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    args = parser.parse_args()
    pipe, network = zoo.load("emoji-sd"), zoo.load("emoji-oms")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffaccel.scheduler("dpmpp_2m", pipe, schedule="trailing")
    pipe.scheduler.set_timesteps(args.steps)
    everything, of_name = pictures(pipe, args.data)
    found = {p: of_name[name(p)] for p in (HERE / "prompts.txt").read_text().splitlines() if name(p) in of_name}
    pairs = [(prompt, seed) for prompt in found for seed in range(args.seeds)]
    prompts = [prompt for prompt, _ in pairs]
    truth = torch.stack([everything[found[prompt]] for prompt in prompts])

    starts = make_starts(pipe, network, pairs, everything.mean(0), truth)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "output_type": "latent"}
    latents = {"the true pictures (through the VAE)": truth}
    latents |= {label: pipe(prompts, latents=start, **call).images for label, start in starts.items()}
    text = report(pipe, latents, prompts, next(iter(starts)))
    header = (
        f"# Starts: `emoji-sd`, guidance scale {args.guidance_scale:g}\n\n"
        f"dpmpp_2m, trailing, {args.steps} steps; {len(found)} prompts x {args.seeds} seeds. Weights `"
        f"{weights_hash(pipe)[:16]}`; torch {torch.__version__}, diffusers {diffusers.__version__}.\n\n"
    )
    save_text(header + text, HERE / "results" / f"starts_emoji-sd_cfg{args.guidance_scale:g}.md")
    print(header + text)


def name(prompt: str) -> str:
    return prompt.removeprefix("an emoji of ").removesuffix(", twemoji style")


@torch.no_grad()
def pictures(pipe: Any, data: Path) -> tuple[Tensor, dict[str, int]]:
    """Latents of the pictures that emoji-sd was trained on, (N, 4, 16, 16), and which one each name means."""
    meta = json.loads((data / "emoji_meta.json").read_text())
    kept = [i for i, (style, _, tone) in enumerate(meta["keys"]) if style == "twemoji" and not tone]
    images = torch.from_numpy(np.load(data / "emoji64.npz")["x"][kept]).permute(0, 3, 1, 2)
    encoded = [pipe.vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(64)]
    of_name: dict[str, int] = {}
    for row, i in enumerate(kept):
        for alias in meta["captions"][i][:3]:
            of_name.setdefault(alias, row)
    return torch.cat(encoded) * pipe.vae.config.scaling_factor, of_name


def make_starts(
    pipe: Any, network: Any, pairs: list[tuple[str, int]], mean: Tensor, truth: Tensor
) -> dict[str, Tensor]:
    """Starting latents by label, all from the same noise; the first is what the pipeline does by itself."""
    text, empty = pipe.encode_prompt([prompt for prompt, _ in pairs], "cpu", 1, True)
    noise = torch.cat([torch.randn(1, *mean.shape, generator=pair_generator(*pair)) for pair in pairs])
    signal = 1 / (1 + float(pipe.scheduler.sigmas[0]) ** 2)

    def step(scale: float) -> Tensor:
        generators = [pair_generator(*pair) for pair in pairs]
        return one_more_step(network, pipe.scheduler, text, generators, scale, empty)

    return {
        "pure noise": noise,
        "One More Step": step(1.0),
        "One More Step, guidance 2": step(2.0),
        "mean latent of all data, no network": signal**0.5 * mean + (1 - signal) ** 0.5 * noise,
        "the true picture's latent": signal**0.5 * truth + (1 - signal) ** 0.5 * noise,
    }


@torch.no_grad()
def report(pipe: Any, latents: dict[str, Tensor], prompts: list[str], base: str) -> str:
    """Tables of brightness, similarity and latent means."""
    model, processor = zoo.load("emoji-clip")
    images = {label: decode(pipe, x) for label, x in latents.items()}
    truth = next(iter(images.values()))
    light = {label: x.mean((1, 2, 3)) for label, x in images.items()}
    error = {label: (x - truth.mean((1, 2, 3))).abs() for label, x in light.items()}
    distance = {label: clip_distance(x, truth, model, processor) for label, x in images.items()}
    lines = [
        "Brightness: mean of a picture, in [0, 1]; mean and standard deviation over pictures. Its error and the "
        "emoji-clip distance are to the true picture: the mean, and the median paired difference to the start from "
        f"{base} (negative is better) with a 95 % interval over prompts.\n",
        "| start | brightness | std | error | difference | clip distance | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in images:
        cells = [f"{light[label].mean():.4f}", f"{light[label].std():.4f}"]
        for measure in (error, distance):
            gain = paired_interval(measure[label], measure[base], prompts, ratio=False)
            own = [f"{measure[label].mean():.4f}", f"{gain.median:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"]
            cells += own if label in list(images)[2:] else [own[0] if label == base else "", ""]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", "Mean of each latent channel over a picture: mean and std over pictures.\n"]
    lines += ["| start | channel 0 | channel 1 | channel 2 | channel 3 |", "|---|---|---|---|---|"]
    for label, x in latents.items():
        own = x.mean((2, 3))
        cells = [f"{m:+.3f}, {s:.3f}" for m, s in zip(own.mean(0), own.std(0), strict=True)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def decode(pipe: Any, latents: Tensor) -> Tensor:
    parts = [pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample for x in latents.split(64)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


if __name__ == "__main__":
    main()
