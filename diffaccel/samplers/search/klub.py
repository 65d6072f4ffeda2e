"""KLUB: the bound on the KL divergence of a sampler with few steps that Align Your Steps minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.search.problem import Problem


@dataclass(frozen=True, eq=False)
class Klub:
    """KLUB (arXiv:2404.14507, eq. 9 without its factor 2) of any schedule of sigma / alpha, per number of a sample.

    Sum over intervals (a, b) of the integral of t^-3 E||D(y_t, t) - D(y_b, b)||^2 dt, where D is the x0 prediction and
    y_b has more noise than y_t: how far the prediction that a first-order step freezes at b is from those along it.

    Attributes:
        levels: (m,) sigma / alpha, increasing.
        gaps: (m, m) E||D(y_j) - D(y_k)||^2 between levels, per number; see `gaps`. Linear in log level between them.
    """

    levels: FloatArray
    gaps: FloatArray

    def of_interval(self, low: float, high: float) -> float:
        """KLUB of one interval."""
        log, top = np.log(self.levels), np.log(high)
        k = int(np.clip(np.searchsorted(log, top), 1, len(log) - 1))
        share = (top - log[k - 1]) / (log[k] - log[k - 1])
        to_high = (1 - share) * self.gaps[:k, k - 1] + share * self.gaps[:k, k]
        inside = self.levels[(self.levels > low) & (self.levels < high)]
        t = np.array([low, *inside, high])
        gap = np.interp(np.log(t), [*log[:k], max(top, log[k - 1] + 1e-12)], [*to_high, 0.0])
        area = 0.5 / t**2  # d(area) = -t^-3 dt: the weight is integrated exactly
        return float(((area[:-1] - area[1:]) * (gap[:-1] + gap[1:]) / 2).sum())

    def of_schedule(self, sigmas: Sequence[float] | FloatArray) -> float:
        """KLUB of a whole schedule; `sigmas` fall, from the first call to the least noise."""
        return sum(self.of_interval(float(low), float(high)) for high, low in pairwise(sigmas))


def refined(klub: Klub, times: int) -> Klub:
    """The same with every interval between its levels, 4 or more that are even in log, divided in `times`.

    Cubic in both log levels, with a minus below the diagonal: for an exact network the gap is the difference of its
    predictions' mean squares, E||D(y_j)||^2 - E||D(y_k)||^2 for less noise at j, which so has no kink at j = k.
    """
    m = len(klub.levels)
    at = np.arange((m - 1) * times + 1) / times
    first = np.clip(np.floor(at).astype(int) - 1, 0, m - 4)
    u = at - first
    weights = np.zeros((len(at), m))
    for a in range(4):
        others = [b for b in range(4) if b != a]
        weights[np.arange(len(at)), first + a] = np.prod([(u - b) / (a - b) for b in others], axis=0)
    signed = weights @ (np.triu(klub.gaps) - np.tril(klub.gaps)) @ weights.T
    return Klub(np.geomspace(klub.levels[0], klub.levels[-1], len(at)), np.abs(signed))


@torch.no_grad()
def gaps(problem: Problem, x0: Tensor, rows: Tensor, levels: FloatArray, generator: torch.Generator) -> FloatArray:
    """(m, m) mean squared difference between the x0 predictions at all pairs of `levels`, in m calls a sample.

    Each clean sample is noised along one path: what it is at a level is what it was at the one below, with noise added.
    So every pair of levels has the joint law that KLUB asks for.

    Args:
        problem: the denoiser, with guidance.
        x0: (n, ...) clean samples.
        rows: (n,) pairs whose conditions they have.
        levels: (m,) sigma / alpha, increasing, > 0.
        generator: of the noise.
    """
    n, m = len(x0), len(levels)
    added = np.sqrt(np.diff(np.square([0.0, *levels])))
    y, path = x0.double(), []
    for std in added:
        y = y + float(std) * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        path.append(y)
    alphas = torch.tensor([problem.schedule.alpha_sigma(float(v))[0] for v in -np.log(levels)], dtype=torch.float64)
    x = torch.stack(path, 1) * alphas.view(1, m, *[1] * (x0.ndim - 1))
    lam = torch.from_numpy(-np.log(levels)).repeat(n)
    found = problem.denoise(x.flatten(0, 1).float(), lam, rows=rows.repeat_interleave(m))
    found = found.detach().cpu().double().view(n, m, -1)
    found = found - found.mean(1, keepdim=True)  # the products below lose digits to what all levels share
    products = torch.einsum("njd,nkd->jk", found, found) / (n * found.shape[2])
    squares = products.diagonal()
    return (squares[:, None] + squares[None] - 2 * products).clamp_min(0).numpy()
