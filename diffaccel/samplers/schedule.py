"""NoiseSchedule: what the network was trained on. Nothing about inference is decided here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Path = Literal["vp", "ve", "flow"]
FloatArray = NDArray[np.floating]  # float64 throughout

FLOW_MARGIN = 1e-9  # sigma = 0 and sigma = 1 have no finite log-SNR: flow paths stop this close to them


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Gaussian path x = alpha * x0 + sigma * eps of a network, and the clock the network is told.

    The half log-SNR lambda = log(alpha / sigma) (DPM-Solver, arXiv:2206.00927) names a noise level on every path:
    `vp` has alpha^2 + sigma^2 = 1, `ve` alpha = 1 (EDM, arXiv:2206.00364), `flow` alpha + sigma = 1 (rectified flow).

    Attributes:
        path: one of `vp`, `ve`, `flow`.
        lambdas: (T,) float64, strictly decreasing: the half log-SNR at each training timestep.
        times: (T,) float64, strictly increasing: what the network is told there (0..T-1, or 0.25 log sigma for EDM).
        whole: the schedule that this one is the clean part of, see `truncated`; None for a network's own.
    """

    path: Path
    lambdas: FloatArray
    times: FloatArray
    whole: NoiseSchedule | None = None

    def __post_init__(self) -> None:
        if not np.all(np.diff(self.lambdas) < 0):
            raise ValueError("the noise schedule's log-SNR does not fall strictly with the timestep; check its betas")

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: ArrayLike) -> NoiseSchedule:
        """Variance-preserving path of the (T,) products of 1 - beta, each in (0, 1)."""
        alpha_bar = np.asarray(alphas_cumprod, dtype=np.float64)
        lambdas = 0.5 * (np.log(alpha_bar) - np.log1p(-alpha_bar))
        return cls("vp", lambdas, np.arange(len(lambdas), dtype=np.float64))

    @classmethod
    def from_sigmas(cls, sigmas: Sequence[float] | FloatArray, path: Path) -> NoiseSchedule:
        """Path of the (T,) increasing sigma / alpha whose network is told 0.25 log(sigma / alpha), as EDM and SVD."""
        log_sigmas = np.log(np.asarray(sigmas, dtype=np.float64))
        return cls(path, -log_sigmas, 0.25 * log_sigmas)

    @classmethod
    def rectified_flow(cls, steps: int) -> NoiseSchedule:
        """Straight path x = (1 - s) * x0 + s * eps whose network is told s * steps."""
        times = np.arange(steps + 1, dtype=np.float64)
        return cls("flow", _flow_lambda(times / steps), times)

    def truncated(self, strength: float) -> NoiseSchedule:
        """Clean part of the schedule: as if the network had been trained on its first strength * T timesteps only.

        The last of them is where Diffusers' `trailing` grid stands after a share 1 - strength of its steps. On flow
        paths it is sigma = strength, before any shift. A strength of 1 is the whole schedule.
        """
        if strength == 1:
            return self
        last = round(strength * self.count, 9) - (self.path != "flow")
        if last < 1:
            raise ValueError(f"strength {strength:g} leaves less than two training timesteps; use a larger one")
        table = np.arange(len(self.times))
        index = np.append(table[table < last], last)
        times = np.interp(index, table, self.times)
        return NoiseSchedule(self.path, self.lambda_at(times), times, self.whole or self)

    @property
    def flow_end(self) -> float:
        """What a flow network is told at sigma = 1."""
        return float((self.whole or self).times[-1])

    @property
    def count(self) -> int:
        """Number of training timesteps; the table of a flow path also holds sigma = 0."""
        return len(self.lambdas) - (self.path == "flow")

    @property
    def lambda_min_noise(self) -> float:
        """Half log-SNR of the least noise the network was trained on (at sigma = 1 / T on flow paths)."""
        return float(self.lambda_at(self.times[1])) if self.path == "flow" else float(self.lambdas[0])

    def alpha_sigma(self, lam: float) -> tuple[float, float]:
        """Return (alpha, sigma) at half log-SNR `lam`; lam = inf gives (1, 0)."""
        if self.path == "ve":
            return 1.0, math.exp(-lam)
        k = 2 if self.path == "vp" else 1  # alpha^k + sigma^k = 1
        return math.exp(-_softplus(-k * lam) / k), math.exp(-_softplus(k * lam) / k)

    def lambda_at(self, times: ArrayLike) -> FloatArray:
        """Half log-SNR where the network is told `times`; piecewise linear between training timesteps."""
        times = np.asarray(times, dtype=np.float64)
        if self.path == "flow":  # the clock is sigma itself: no table needed
            return _flow_lambda(times / self.flow_end)
        return np.interp(times, self.times, self.lambdas)

    def time_at(self, lam: ArrayLike) -> FloatArray:
        """What the network is told at half log-SNR `lam`; the inverse of `lambda_at`."""
        lam = np.asarray(lam, dtype=np.float64)
        if self.path == "flow":
            return self.flow_end * self.sigma_at(lam)
        return np.interp(-lam, -self.lambdas, self.times)

    def sigma_at(self, lam: ArrayLike) -> FloatArray:
        """What Diffusers calls `sigmas`: sigma / alpha on VP and VE paths, sigma on flow paths."""
        lam = np.asarray(lam, dtype=np.float64)
        return np.exp(-np.logaddexp(0, lam)) if self.path == "flow" else np.exp(-lam)

    def lambda_of_sigma(self, sigmas: ArrayLike) -> FloatArray:
        """Return the inverse of `sigma_at`; `sigmas` must be > 0, and at most 1 on flow paths."""
        sigmas = np.asarray(sigmas, dtype=np.float64)
        return _flow_lambda(sigmas) if self.path == "flow" else -np.log(sigmas)


def _softplus(x: float) -> float:
    """Return log(1 + e^x); x may be infinite."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _flow_lambda(sigma: FloatArray) -> FloatArray:
    sigma = np.clip(sigma, FLOW_MARGIN, 1 - FLOW_MARGIN)
    return np.log1p(-sigma) - np.log(sigma)


def betas(kind: str, start: float, end: float, count: int) -> FloatArray:
    """(count,) betas of the named schedule; the names and formulas are those of Diffusers' `beta_schedule`."""
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    if kind == "squaredcos_cap_v2":  # arXiv:2102.09672, eq. 17
        alpha_bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    if kind == "sigmoid":
        return (end - start) / (1 + np.exp(-np.linspace(-6, 6, count))) + start
    raise ValueError(f"unknown beta_schedule {kind!r}; use linear, scaled_linear, squaredcos_cap_v2 or sigmoid")


def zero_terminal_snr(alphas_cumprod: FloatArray) -> FloatArray:
    """Rescale alpha-bar so that the last one is (almost) zero (arXiv:2305.08891, algorithm 1).

    It becomes 2^-24 and not 0, as in Diffusers: log-SNR must be finite.
    """
    root = np.sqrt(alphas_cumprod)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.maximum(root**2, 2.0**-24)
