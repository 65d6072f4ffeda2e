"""A scheduler's run on a toy network: what it does is observed, not read from its source.

How often it calls the network, at which times, where it ends, and whether it is another scheduler under another name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Trace:
    """What a scheduler did on the toy network.

    Attributes:
        calls: network calls.
        timesteps: what the network was told at each, rounded to 0.01.
        ends_at: noise level left at the end, over the smallest trained one: 0 or about 1.
        fingerprint: result, rounded; equal for schedulers that are the same method.
    """

    calls: int
    timesteps: tuple[float, ...]
    ends_at: float
    fingerprint: tuple[float, ...]

    @property
    def grid(self) -> tuple[Any, ...]:
        """Equal for runs that visit the same noise levels and end at the same one."""
        return self.timesteps, self.ends_at > 0.5


def dry_run(scheduler: Any, arguments: Mapping[str, Any], config: Mapping[str, Any]) -> Trace:
    """Run `scheduler` on the toy network: once on curved data and once on a point, which every solver solves exactly.

    Raises:
        Exception: whatever the scheduler raises.
        ArithmeticError: if the result is not finite.
    """
    lambdas = _lambdas(tuple(sorted((k, v) for k, v in config.items() if k in _SCHEDULE_KEYS and v is not None)))
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    told, curved = _loop(scheduler, arguments, noise, lambdas, width=0.5)
    _, point = _loop(scheduler, arguments, noise, lambdas, width=0.0)
    if not (curved.isfinite().all() and point.isfinite().all()):
        raise ArithmeticError("its result is not finite")
    residue = float((point - 1).abs().mean()) / float(noise.abs().mean())
    sigma_min = math.exp(-lambdas[0])
    rounded = tuple(round(v, 4) for v in curved.flatten().tolist())
    return Trace(len(told), tuple(round(t, 2) for t in told), residue / sigma_min, rounded)


_SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")


@cache
def _lambdas(schedule: tuple[tuple[str, Any], ...]) -> np.ndarray:
    alpha_bar = diffusers.DDPMScheduler(**dict(schedule)).alphas_cumprod.double().numpy()
    return 0.5 * np.log(alpha_bar / (1 - alpha_bar))


def _loop(
    scheduler: Any, arguments: Mapping[str, Any], noise: Tensor, lambdas: np.ndarray, width: float
) -> tuple[list[float], Tensor]:
    """The pipelines' denoising loop; returns the times told and the result."""
    scheduler.set_timesteps(**arguments)
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(0), "eta": 0.0}
    extra = {k: v for k, v in extra.items() if k in accepted}
    x, told = noise * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        told.append(float(t))
        eps = _toy_eps(scheduler.scale_model_input(x, t), float(t), lambdas, width)
        x = scheduler.step(eps, t, x, **extra, return_dict=False)[0]
    return told, x


def _toy_eps(x: Tensor, t: float, lambdas: np.ndarray, width: float) -> Tensor:
    """Exact epsilon for data at -1 and 1 with standard deviation `width`; for width 0, at 1 alone."""
    lam = float(np.interp(t, np.arange(len(lambdas)), lambdas))
    alpha, sigma = math.sqrt(1 / (1 + math.exp(-2 * lam))), math.sqrt(1 / (1 + math.exp(2 * lam)))
    variance = (alpha * width) ** 2 + sigma**2
    side = torch.tanh(alpha * x / variance) if width else torch.ones_like(x)
    x0 = (alpha * width**2 * x + sigma**2 * side) / variance
    return (x - alpha * x0) / sigma
