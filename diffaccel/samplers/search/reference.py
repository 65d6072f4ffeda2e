"""Reference trajectories: the converged solution from each start, at every noise level."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from safetensors.torch import load_file
from torch import Tensor

from diffaccel.eval.files import save_tensors
from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.rollout import run
from diffaccel.samplers.tabulate import grid_of, tabulate

SOLVER = ExponentialAdams(order=2, corrector=True, second="midpoint", lower_final=0)  # UniPC-2: third order


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The solution of the network's ODE for some pairs.

    Attributes:
        schedule: noise schedule.
        lambdas: (K,) half log-SNR, increasing, from the most trained noise to the least.
        x: (K, B, ...) samples there.
        x0: (K, B, ...) predictions there; the last are the samples at sigma = 0.
    """

    schedule: NoiseSchedule
    lambdas: FloatArray
    x: Tensor
    x0: Tensor

    @property
    def end(self) -> Tensor:
        """(B, ...) samples at sigma = 0."""
        return self.x0[-1]

    def part(self, rows: Tensor | slice) -> Trajectory:
        """Of some of the pairs."""
        return Trajectory(self.schedule, self.lambdas, self.x[:, rows], self.x0[:, rows])

    def at(self, lam: float) -> Tensor:
        """(B, ...) samples at half log-SNR `lam`; inf is the end.

        Cubic Hermite interpolation of y = x / alpha in half log-SNR, as its slope, x0 - y, is known at every node: an
        error of fourth order in their distance.
        """
        if lam >= self.lambdas[-1]:
            left = math.exp(
                float(self.lambdas[-1]) - lam
            )  # of the noise; a first-order step, as the reference's own last
            return (self.end + left * (self._y(-1) - self.end)) * self.schedule.alpha_sigma(lam)[0]
        i = int(np.clip(np.searchsorted(self.lambdas, lam, side="right") - 1, 0, len(self.lambdas) - 2))
        h = float(self.lambdas[i + 1] - self.lambdas[i])
        u = (lam - float(self.lambdas[i])) / h
        (a, b), (da, db) = (self._y(i), self._y(i + 1)), (self._slope(i), self._slope(i + 1))
        y = (
            (1 + 2 * u) * (1 - u) ** 2 * a
            + u**2 * (3 - 2 * u) * b
            + h * u * (1 - u) ** 2 * da
            - h * u**2 * (1 - u) * db
        )
        return y * self.schedule.alpha_sigma(lam)[0]

    def x0_at(self, lam: float) -> Tensor:
        """(B, ...) predictions at half log-SNR `lam`, linear between the nodes."""
        i = int(np.clip(np.searchsorted(self.lambdas, lam, side="right") - 1, 0, len(self.lambdas) - 2))
        u = float(np.clip((lam - self.lambdas[i]) / (self.lambdas[i + 1] - self.lambdas[i]), 0, 1))
        return torch.lerp(self.x0[i], self.x0[i + 1], u)

    def _y(self, i: int) -> Tensor:
        return self.x[i] / self.schedule.alpha_sigma(float(self.lambdas[i]))[0]

    def _slope(self, i: int) -> Tensor:
        return self.x0[i] - self._y(i)


@torch.no_grad()
def reference(
    problem: Problem, steps: int = 100, *, cache: str | Path | None = None, progress: bool = True
) -> Trajectory:
    """Solve the problem's ODE with `steps` calls, even in log-SNR: a third-order solver, from the noisiest to the end.

    Args:
        problem: its pairs are solved `problem.batch` at a time.
        steps: network calls of each pair, one more for flow models.
        cache: folder that keeps every finished batch under a hash of the problem's key, so that an interrupted run goes
            on; not used for problems without a key.
        progress: show a progress bar over pairs.
    """
    lambdas = np.array(time_grid(problem.schedule, steps, "logsnr").lambdas[:-1])
    # Flow models start from pure noise, which has no log-SNR to be even in: a step of its own leads to where they are.
    before = [v for v in problem.schedule.lambdas[-1:] if v < lambdas[0]]
    table = tabulate(problem.schedule, grid_of(problem.schedule, [*before, *lambdas]), SOLVER)
    parts = []
    with tqdm(total=len(problem), desc="reference", disable=not progress) as bar:
        for i in range(0, len(problem), problem.batch):
            rows = slice(i, i + problem.batch)
            part = problem.part(rows)
            path = _path(part, steps, cache)
            if path is not None and path.exists():
                found = load_file(path)
            else:
                states, known = run(part, table)
                found = {"x": torch.stack(states[len(before) : -1]), "x0": torch.stack(known[len(before) :])}
                problem.spent += part.spent
                if path is not None:
                    save_tensors(found, path)
            parts.append(found)
            bar.update(len(part))
    x, x0 = (torch.cat([part[name] for part in parts], 1) for name in ("x", "x0"))
    return Trajectory(problem.schedule, lambdas, x, x0)


def _path(problem: Problem, steps: int, cache: str | Path | None) -> Path | None:
    if cache is None or not problem.key:
        return None
    # The noise is a function of prompt and seed: it stands for them.
    said = json.dumps([problem.key, steps, list(problem.noise.shape)]).encode() + problem.noise.numpy().tobytes()
    return Path(cache) / f"reference-{hashlib.sha256(said).hexdigest()[:20]}.safetensors"
