"""The main job on a real model: one noise through the pipeline's own scheduler, the best of Diffusers, and ours."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from diffaccel import __version__, zoo
from diffaccel.eval.fidelity import clip_distance, latent_mse, psnr
from diffaccel.eval.reference import ReferenceSettings, converged_reference, pair_generator, weights_hash
from diffaccel.pictures import labelled_grid, save_picture, save_text
from diffaccel.samplers.catalog import DEFAULT, scheduler

# Captions whose converged pictures are recognisable; nothing else was looked at when they were chosen.
PROMPTS = ("blue heart", "grinning face", "evergreen tree", "green book", "cat face", "umbrella", "rocket", "tomato")
COLUMNS = 8
# The three stock configurations that lead benchmarks/results on this model; the best of them is shown.
STOCK = (
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
)
OURS = DEFAULT


@dataclass(frozen=True)
class Result:
    """One line of the table: medians over the pictures, against the converged reference.

    Attributes:
        method: what ran.
        network_calls: calls of the U-Net per picture (each on the CFG pair).
        seconds: wall time of the pipeline call for all pictures, without decoding.
        latent_mse: of the latents.
        psnr: of the decoded pictures, in dB.
        emoji_clip: 1 - cosine of the emoji-clip features of the pictures.
    """

    method: str
    network_calls: int
    seconds: float
    latent_mse: float
    psnr: float
    emoji_clip: float


def run_demo(prompts: Sequence[str] | None, steps: int, guidance_scale: float, seed: int, output: Path) -> list[Result]:
    """Compare samplers at `steps` network calls on emoji-sd; write `grid.png` and `demo.json` and print the table."""
    captions = [p if "," in p else f"{p}, twemoji style" for p in prompts or PROMPTS]
    seeds = range(seed, seed + max(1, COLUMNS // len(captions)))
    pipe = zoo.load("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    contenders = _contenders(own, steps)
    settings = ReferenceSettings(steps=50)
    reference = converged_reference(
        pipe, captions, seeds, guidance_scale=guidance_scale, settings=settings, batch_prompts=len(captions)
    )
    latents, seconds = {}, {}
    for name, make in tqdm(contenders.items(), desc=f"{steps} network calls each"):
        pipe.scheduler = make()
        latents[name], seconds[name] = _latents(pipe, captions, seeds, steps, guidance_scale)
    # Of the stock configurations the best one is kept, by the measure the table is sorted by.
    error = {name: float(latent_mse(x, reference.latents).median()) for name, x in latents.items()}
    best = min((name for name in latents if name.startswith("Diffusers")), key=error.__getitem__)
    shown = [name for name in latents if name == best or not name.startswith("Diffusers")]
    pictures = {"reference": _decode(pipe, reference.latents)} | {name: _decode(pipe, latents[name]) for name in shown}
    model, processor = zoo.load("emoji-clip")
    results = [
        Result(
            name,
            steps,
            round(seconds[name], 2),
            error[name],
            float(psnr(pictures[name], pictures["reference"]).median()),
            float(clip_distance(pictures[name], pictures["reference"], model, processor).median()),
        )
        for name in shown
    ]
    calls = 2 * settings.steps
    _write(output, results, pictures, captions, seeds, guidance_scale, calls, weights_hash(pipe))
    _print(results, calls, output)
    return results


def _contenders(own: Any, steps: int) -> dict[str, Callable[[], Any]]:
    """Name of each method -> maker of its scheduler."""
    if steps < 1:
        raise ValueError(f"--steps must be 1 or more, not {steps}")
    contenders: dict[str, Callable[[], Any]] = {
        f"pipeline's own\n{type(own).__name__.removesuffix('Scheduler')}": lambda: own
    }
    for name, options in STOCK:
        words = "\n".join(f"{key}={value}" for key, value in options.items())
        label = f"Diffusers\n{name.removesuffix('Scheduler')}\n{words}"
        contenders[label] = lambda name=name, options=options: getattr(diffusers, name).from_config(
            own.config, **options
        )
    label = "diffaccel\n" + ", ".join(OURS.values())
    contenders[label] = lambda: scheduler(pipe_or_config=own.config, **OURS)
    return contenders


def _latents(pipe: Any, captions: Sequence[str], seeds: range, steps: int, scale: float) -> tuple[Tensor, float]:
    """Final latents of every caption and seed, and the seconds they took."""
    started = time.perf_counter()
    out = pipe(
        [caption for caption in captions for _ in seeds],
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=[pair_generator(caption, seed) for caption in captions for seed in seeds],
        output_type="latent",
    )
    return out.images, time.perf_counter() - started


@torch.no_grad()
def _decode(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures in [0, 1], float NCHW."""
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def _write(
    output: Path,
    results: Sequence[Result],
    pictures: dict[str, Tensor],
    captions: Sequence[str],
    seeds: range,
    guidance_scale: float,
    reference_calls: int,
    weights: str,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    mse = {r.method: f"\nlatent MSE {r.latent_mse:.4f}" for r in results}
    labels = [f"reference\n{reference_calls} network calls"]
    labels += [f"{r.method}\n{r.network_calls} network calls{mse[r.method]}" for r in results]
    to_image = lambda x: Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy())  # noqa: E731
    rows = [[to_image(x) for x in pictures[name]] for name in ("reference", *(r.method for r in results))]
    columns = [_wrapped(c.removesuffix(", twemoji style")) for c in captions for _ in seeds]
    save_picture(labelled_grid(rows, labels, columns), output / "grid.png")
    record = {
        "weights": {"model": "emoji-sd", "sha256": weights},
        "versions": {"diffaccel": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
        "prompts": list(captions),
        "seeds": list(seeds),
        "guidance_scale": guidance_scale,
        "reference_network_calls": reference_calls,
        "results": [asdict(r) | {"method": r.method.replace("\n", ", ")} for r in results],
    }
    save_text(json.dumps(record, indent=2) + "\n", output / "demo.json")


def _wrapped(words: str, width: int = 15) -> str:
    """Put the words of a caption on two lines where they are too wide for a column."""
    if len(words) <= width or " " not in words:
        return words[: 2 * width]
    head, _, tail = words[:width].rpartition(" ")
    return f"{head or words[:width]}\n{(tail + words[width:])[:width]}"


def _print(results: Sequence[Result], reference_calls: int, output: Path) -> None:
    print(f"\nmedians over the pictures, against {reference_calls} network calls:")
    print(f"{'method':86} {'calls':>5} {'seconds':>8} {'latent MSE':>11} {'PSNR dB':>8} {'emoji-clip':>11}")
    for r in results:
        method = r.method.replace("\n", ", ")
        print(
            f"{method:86} {r.network_calls:5d} {r.seconds:8.2f} {r.latent_mse:11.5f} {r.psnr:8.2f} {r.emoji_clip:11.4f}"
        )
    print(
        f"\nDiffusers: the best of {len(STOCK)} stock settings on these very pictures; see benchmarks/ for all of them."
    )
    print(f"pictures: {output / 'grid.png'}\nnumbers:  {output / 'demo.json'}")
