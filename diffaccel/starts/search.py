"""Optimal boundary condition (arXiv:2305.15357): one noise, chosen once, that suits all inputs of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm


class SelectedNoise(NamedTuple):
    """Result of `select_initial_noise`.

    Attributes:
        noise: the best x_T, float32, on the CPU, of the shape asked for.
        seed: its seed: `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`.
        scores: for each candidate seed its mean metric, in the order given; lower is better.
    """

    noise: Tensor
    seed: int
    scores: dict[int, float]


@torch.no_grad()
def select_initial_noise(
    sample: Callable[[Tensor, Any], Any],
    references: Sequence[tuple[Any, Any]],
    candidates: Sequence[int],
    metric: Callable[[Any, Any], float | Tensor],
    *,
    shape: Sequence[int],
) -> SelectedNoise:
    """The candidate noise with the least mean metric over a small reference set; use it for every later input.

    x_T* = argmin over candidates of (1 / R) sum_i metric(sample(x_T, condition_i), target_i). The paper finds, for
    super-resolution, that one x_T is nearly optimal for all low-resolution inputs; its metric is LPIPS and its sampler
    few-step DDIM. It takes len(candidates) * len(references) runs of `sample`.

    Built from the paper's abstract and public reviews, since no code was found. Not known: the number of candidates,
    the size R of the reference set, and what becomes of x_T at other picture sizes; none is guessed here, and the
    result has one size. Reviewers note low PSNR in its tables, and smaller gains on StableSR than on SR3. We have no
    super-resolution model to measure it on.

    Args:
        sample: sample(noise, condition) -> result. It must be deterministic: an ODE solver (`eta` 0), no own noise.
            With a pipeline: `lambda z, low: pipe(image=low, latents=z, num_inference_steps=8).images`.
        references: R pairs (condition, target).
        candidates: seeds of the noises to try, all different.
        metric: metric(result, target) -> one number, lower is better.
        shape: shape of x_T as `sample` takes it, with the batch dimension.

    Raises:
        ValueError: for no candidates, no references, repeated seeds, or a metric that is not finite.
    """
    if not candidates or not references:
        raise ValueError("select_initial_noise needs at least one candidate seed and one (condition, target) pair")
    if len(set(candidates)) < len(candidates):
        raise ValueError("candidate seeds must all be different; a noise need not be tried twice")
    scores: dict[int, float] = {}
    with tqdm(total=len(candidates) * len(references), desc="initial noise") as progress:
        for seed in candidates:
            noise = _noise(seed, shape)
            total = 0.0
            for number, (condition, target) in enumerate(references):
                # A copy, in case the sampler works in place.
                value = float(metric(sample(noise.clone(), condition), target))
                if not math.isfinite(value):
                    raise ValueError(f"the metric of seed {seed} on reference {number} is {value}; it must be finite")
                total += value
                progress.update()
            scores[seed] = total / len(references)
    best = min(scores, key=scores.__getitem__)
    return SelectedNoise(_noise(best, shape), best, scores)


def _noise(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
