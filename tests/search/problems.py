"""Noise schedules, and problems with a known denoiser."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from diffaccel.samplers.schedule import NoiseSchedule, betas
from diffaccel.samplers.search.problem import Problem

SCHEDULES = {
    "vp": NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000))),
    "ve": NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 1000), "ve"),
    "flow": NoiseSchedule.rectified_flow(1000),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEANS = 1.2 * draw(5, 12, seed=3)


def levels(schedule: NoiseSchedule, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of each sample, (n, 1), differentiable."""
    if schedule.path == "ve":
        return torch.ones_like(lam)[:, None], (-lam).exp()[:, None]
    k = 2 if schedule.path == "vp" else 1
    return (torch.sigmoid(k * lam) ** (1 / k))[:, None], (torch.sigmoid(-k * lam) ** (1 / k))[:, None]


def mixture(
    schedule: NoiseSchedule, pairs: int = 16, *, std: float = 0.3, hears: float = 0.0, double: bool = True
) -> Problem:
    """Data of five Gaussians in 12 dimensions.

    Args:
        schedule: of the problem.
        pairs: of it; the start of each is pure noise of its own.
        std: of each Gaussian.
        hears: how much what it is told changes the denoiser, which knows the noise besides.
        double: keep float64 throughout.
    """
    spread = torch.from_numpy(np.linspace(0.5, 1.5, 12)) * std

    def x0(x: Tensor, lam: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        alpha, sigma = levels(schedule, lam)
        y, s2 = x.double() / alpha, (sigma / alpha) ** 2
        if hears:
            s2 = s2 * (hears * torch.cos(torch.pi * time / np.ptp(schedule.times)))[:, None].exp()
        total = spread**2 + s2
        logits = (y / total) @ MEANS.T - (MEANS**2 / total[:, None]).sum(-1) / 2
        out = (spread**2 * y + s2 * (logits.softmax(1) @ MEANS)) / total
        return out if double else out.float()

    start = schedule.alpha_sigma(float(schedule.lambdas[-1]))[1] * draw(pairs, 12)
    return Problem(schedule, x0, start if double else start.float())


def gaussian(schedule: NoiseSchedule, pairs: int = 8, std: float = 0.5, size: int = 6) -> Problem:
    """Data of one Gaussian around 0: x0(x) = std^2 alpha x / (std^2 alpha^2 + sigma^2)."""

    def x0(x: Tensor, lam: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        alpha, sigma = levels(schedule, lam)
        return x * (std**2 * alpha / (std**2 * alpha**2 + sigma**2))

    return Problem(schedule, x0, schedule.alpha_sigma(float(schedule.lambdas[-1]))[1] * draw(pairs, size))
