"""How many steps of the pipeline's own scheduler a few calls of ours are worth.

`python benchmarks/steps_saved.py` writes results/steps_saved_emoji-sd_cfg4.md: distances to the converged reference on
the held-out prompts of prompts.txt, one seed each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
import torch

import diffaccel
from diffaccel import zoo
from diffaccel.demo import OURS
from diffaccel.eval.fidelity import clip_distance, latent_mse, paired_interval, psnr
from diffaccel.eval.reference import converged_reference, pair_generator, reference_key
from diffaccel.pictures import save_text

HERE = Path(__file__).parent
SCREENING_PROMPTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    args = parser.parse_args()
    prompts = (HERE / "prompts.txt").read_text().split("\n")[SCREENING_PROMPTS:][: args.prompts]
    pipe = zoo.load("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    model, processor = zoo.load("emoji-clip")
    own, key = pipe.scheduler, reference_key(pipe)
    cache = HERE / "cache" / "references"
    reference = converged_reference(pipe, prompts, [0], guidance_scale=args.guidance_scale, cache=cache)
    pictures = decode(pipe, reference.latents)

    def run(scheduler, steps: int) -> torch.Tensor:
        pipe.scheduler = scheduler
        generators = [pair_generator(prompt, 0) for prompt in prompts]
        call = {"guidance_scale": args.guidance_scale, "generator": generators, "output_type": "latent"}
        return pipe(prompts, num_inference_steps=steps, **call).images

    def row(name: str, steps: int, latents: torch.Tensor, against: torch.Tensor) -> str:
        images, error = decode(pipe, latents), latent_mse(latents, reference.latents)
        ratio = paired_interval(against, error, prompts)
        clip = clip_distance(images, pictures, model, processor).median()
        return (
            f"| {name} | {steps} | {error.median():.5f} | {psnr(images, pictures).median():.1f} | {clip:.4f} "
            f"| {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] |"
        )

    ours = run(diffaccel.scheduler(pipe_or_config=own.config, **OURS), 8)
    error = latent_mse(ours, reference.latents)
    lines = [row("diffaccel " + ", ".join(OURS.values()), 8, ours, error)]
    lines += [row(f"its own, {type(own).__name__}", n, run(own, n), error) for n in (8, 20, 30, 50)]
    text = (
        f"# Steps saved: `emoji-sd`, guidance scale {args.guidance_scale:g}\n\n"
        f"Weights and noise schedule `{key[:16]}`; torch {torch.__version__}, diffusers {diffusers.__version__}; "
        f"{len(prompts)} held-out prompts, one seed. Medians, to the converged reference (200 calls). The ratio is the "
        "median of the paired latent MSE, ours at 8 calls / this row, with a 95 % interval over prompts.\n\n"
        "| scheduler | network calls | latent MSE | PSNR dB | emoji-clip distance | ours at 8 / this |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    name = f"steps_saved_emoji-sd_cfg{args.guidance_scale:g}.md"
    save_text(text, HERE / "results" / name)
    print(text)


@torch.no_grad()
def decode(pipe, latents: torch.Tensor) -> torch.Tensor:
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


if __name__ == "__main__":
    main()
