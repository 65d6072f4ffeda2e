"""Data with a known answer: Gaussian mixtures, whose exact x0 prediction has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffaccel.samplers.schedule import NoiseSchedule

SIZE, COMPONENTS, MEAN_STD = 64, 6, 0.8


@dataclass(frozen=True)
class Mixtures:
    """Several mixtures of 8 x 8 numbers, side by side, with equal weights and one diagonal covariance.

    Attributes:
        means: (mixtures, components, 64).
        variances: (64,), those inside every component.
    """

    means: Tensor
    variances: Tensor

    @classmethod
    def drawn(cls, count: int, stds: tuple[float, float], generator: torch.Generator) -> Mixtures:
        """`count` mixtures with Gaussian means; the standard deviations fall geometrically between `stds`.

        Where they do, some details lie below the noise until its very end, as in pictures.
        """
        means = MEAN_STD * torch.randn(count, COMPONENTS, SIZE, generator=generator, dtype=torch.float64)
        return cls(means, torch.from_numpy(np.geomspace(*stds, SIZE)) ** 2)

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x] for x = alpha * x0 + sigma * eps of shape (mixtures, n, 64)."""
        total = alpha**2 * self.variances + sigma**2
        towards = alpha * self.means / total
        logits = x @ towards.mT - (alpha / 2 * self.means * towards).sum(-1)[:, None]
        mean = logits.softmax(-1) @ self.means
        return (alpha * self.variances * x + sigma**2 * mean) / total

    def output(self, x: Tensor, alpha: float, sigma: float, path: str) -> Tensor:
        """What an exact network says of `x`: eps, or the velocity eps - x0 on flow paths."""
        x0 = self.x0(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return eps - x0 if path == "flow" else eps

    def solution(self, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The exact ODE from `noise` at the most trained noise to the least, and the x0 prediction there."""
        end = schedule.lambda_min_noise
        return self.x0(self.ode(noise, schedule, end), *schedule.alpha_sigma(end))

    def ode(self, noise: Tensor, schedule: NoiseSchedule, end: float) -> Tensor:
        """Sample at half log-SNR `end` on the exact ODE from `noise` at the most trained noise.

        DOP853 at a relative tolerance of 1e-12; on flow paths the sample against sigma, elsewhere sample / alpha
        against half log-SNR.
        """
        flow, start = schedule.path == "flow", float(schedule.lambdas[-1])
        first, last = schedule.alpha_sigma(start), schedule.alpha_sigma(end)

        def rate(clock: float, v: Tensor) -> Tensor:
            if flow:
                return self.output(v, 1 - clock, clock, "flow")
            return self.x0(v, 1.0, np.exp(-clock)) - v

        y = noise if flow else noise / first[0]
        found = solve_ivp(
            lambda clock, v: rate(clock, torch.from_numpy(v).view_as(y)).flatten().numpy(),
            (first[1], last[1]) if flow else (start, end),
            y.flatten().numpy(),
            method="DOP853",
            rtol=1e-12,
            atol=1e-13,
        )
        if not found.success:
            raise RuntimeError(f"the exact solution was not found: {found.message}")
        return torch.from_numpy(found.y[:, -1].copy()).view_as(y) * (1.0 if flow else last[0])
