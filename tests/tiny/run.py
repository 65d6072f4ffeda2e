"""A toy pipeline's run: built once from a fixed seed, drawn from another, compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = 8  # of latents, and of pictures where there is a VAE: it does not downsample
Toy = tuple[Any, dict[str, Any]]  # pipeline, arguments of its call


def relative(a: Tensor, b: Tensor) -> float:
    """Root mean square of a - b, over that of b; nan if either is not finite."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def draw(toy: Toy, scheduler: Any, steps: int, **call: Any) -> Tensor:
    """Picture (or latents, where the pipeline returns them) of `toy` with `scheduler`, from seed 0."""
    pipe, arguments = toy
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # DiTPipeline does not hand its generator on to the scheduler
        images = pipe(num_inference_steps=steps, **{"generator": generator, **arguments, **call})[0]
    return torch.as_tensor(images)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], Toy]) -> Callable[[], Toy]:
    """Build once, from a fixed seed and without touching the global generator; each call gives back its scheduler."""

    @cache
    def built() -> tuple[Any, dict[str, Any], Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe, call = build()
        return pipe, call, pipe.scheduler

    @wraps(build)
    def toy() -> Toy:
        pipe, call, scheduler = built()
        pipe.scheduler = scheduler
        return pipe, dict(call)

    return toy


def assemble(pipeline: Any, **parts: Any) -> Any:
    """`pipeline` of `parts`, in evaluation mode and silent; parts it asks for and is not given are None."""
    asked = inspect.signature(pipeline).parameters.values()
    empty = {p.name: None for p in asked if p.default is p.empty}
    pipe = pipeline(**empty | parts)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # DiT drops class labels at random otherwise
    pipe.set_progress_bar_config(disable=True)
    return pipe
