"""The plain job: pictures from any local or hub model with one of our schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from diffaccel import zoo
from diffaccel.pictures import save_picture
from diffaccel.samplers.catalog import DEFAULT, parse_schedule, parse_solver
from diffaccel.samplers.catalog import scheduler as make_scheduler
from diffaccel.samplers.grid import Final

if TYPE_CHECKING:
    from diffaccel.samplers.search.recipe import Recipe


def load_pipeline(model: str, device: str | None = None, dtype: str | None = None) -> DiffusionPipeline:
    """Pipeline of a zoo name, a local folder or a hub id, on `device` (default: what there is)."""
    parts = {
        "emoji-clip": "a feature extractor",
        "emoji-oms": "the network of one more step",
        "emoji-sd-small": "a small network for stitching",
    }
    if model in parts:
        raise ValueError(f"{model} is {parts[model]} and makes no pictures; use emoji-sd")
    device = device or best_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    kind = getattr(torch, dtype) if dtype else (torch.float32 if device == "cpu" else torch.float16)
    pipe = zoo.load(model, dtype=kind) if model in zoo.NAMES else DiffusionPipeline.from_pretrained(model, dtype=kind)
    return pipe.to(device)


def sample(
    model: str,
    prompts: Sequence[str],
    *,
    scheduler: str | None = None,
    schedule: str | None = None,
    final: Final = "zero",
    recipe: Path | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    output: Path = Path("diffaccel-samples"),
) -> list[Path]:
    """Write one PNG per prompt into `output` and return their paths; prompt i uses seed `seed` + i.

    Without a scheduler it is `catalog.DEFAULT`, on its schedule and to its end unless another schedule is named, and
    10 steps. A recipe takes the place of all that, and of the guidance scale.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"--steps must be 1 or more, not {steps}")
    if recipe is not None:
        from diffaccel.samplers.search.recipe import Recipe  # evaluation comes with it, which imports this module

        if scheduler or schedule or final != "zero":
            raise ValueError("a recipe has its own schedule and end; leave out --scheduler, --schedule and --final")
        pipe, steps, guidance_scale = _with_recipe(model, Recipe.load(recipe), steps, guidance_scale, device, dtype)
    else:
        pipe = _with_scheduler(model, scheduler, schedule, final, device, dtype)
        steps = steps or 10
    options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    output.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        picture = pipe(prompt, num_inference_steps=steps, generator=generator, **options).images[0]
        paths.append(output / f"{i:03d}.png")
        save_picture(picture, paths[-1])
    return paths


def _with_scheduler(
    model: str, scheduler: str | None, schedule: str | None, final: Final, device: str | None, dtype: str | None
) -> Any:
    if scheduler is None and schedule is None:
        schedule, final = DEFAULT["schedule"], DEFAULT["final"]
    solver: str = scheduler or DEFAULT["solver"]
    parse_solver(solver)  # refuse unknown names before a model is loaded
    if schedule is not None:
        parse_schedule(schedule)
    pipe: Any = load_pipeline(model, device, dtype)
    pipe.scheduler = make_scheduler(solver, pipe, schedule=schedule, final=final)
    return pipe


def _with_recipe(
    model: str, recipe: Recipe, steps: int | None, guidance_scale: float | None, device: str | None, dtype: str | None
) -> tuple[Any, int, float]:
    """The pipeline with a recipe on it, and the steps and guidance scale that it is for."""
    scales = sorted({entry.guidance_scale for entry in recipe.entries})
    if guidance_scale is None and len(scales) > 1:
        raise ValueError(f"this recipe is for guidance {_either(scales)}; say which: --guidance-scale {scales[0]:g}")
    scale = scales[0] if guidance_scale is None else guidance_scale
    if scale not in scales:
        raise ValueError(f"this recipe is for guidance {_either(scales)}, not {scale:g}; make one by diffaccel search")
    have = sorted(entry.steps for entry in recipe.entries if entry.guidance_scale == scale)
    if steps is None and len(have) > 1:
        raise ValueError(f"this recipe is for {_either(have)} steps; say which: --steps {have[0]}")
    wanted = have[0] if steps is None else steps
    if wanted not in have:
        raise ValueError(f"this recipe is for {_either(have)} steps, not {wanted}; make one by diffaccel search")
    pipe: Any = load_pipeline(model, device, dtype)
    recipe.apply(pipe, wanted, scale)
    return pipe, wanted, scale


def _either(numbers: Sequence[float]) -> str:
    return " or ".join(f"{number:g}" for number in numbers)


def best_device() -> str:
    """The device there is: "cuda", else "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
