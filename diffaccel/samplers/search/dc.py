"""DC-Solver: the newest prediction is moved along the history, by one searched ratio a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from torch import Tensor

from diffaccel.samplers.compensation import ORDER, compensation
from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.grid import TimeGrid, time_grid
from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory
from diffaccel.samplers.search.rollout import run
from diffaccel.samplers.solver import Multistep
from diffaccel.samplers.tabulate import Found, tabulate, unrolled

UNIPC = ExponentialAdams(order=2, corrector=True, second="midpoint")  # B2(h), what the authors search on text-to-image
BOUNDS = (0.0, 2.0)


def dc(
    problem: Problem,
    trajectory: Trajectory,
    steps: int,
    *,
    solver: Multistep = UNIPC,
    grid: TimeGrid | None = None,
    order: int = ORDER,
    evaluations: int = 8,
    progress: bool = True,
) -> Found:
    """Search the ratios step by step: each is the one after which the sample is closest to the reference.

    The sample is that at the next node, as the solver's corrector leaves it; all pairs share a ratio. Where the paper
    descends with AdamW for 40 iterations through the network, here
    a step without a corrector is a polynomial in its ratio, whose least error is found in closed form, and one with a
    corrector costs `evaluations` network calls: the closed form of the prediction, and parabolas around it. The
    reference is exact at the very node (the authors look up the nearest of 200).

    Args:
        problem: pairs to fit; the paper takes ten.
        trajectory: their reference.
        steps: network calls.
        solver: multistep and deterministic: UniPC, DPM-Solver++, DEIS, DDIM...
        grid: default: even in time, ending at the least noise trained, as the paper has it.
        order: K of the interpolation.
        evaluations: network calls for each pair and ratio, where there is a corrector.
        progress: show a progress bar over steps.

    Returns:
        The table, and `ratios` in the notes, one a step; the first `order` are 1.
    """
    schedule = problem.schedule
    grid = grid or time_grid(schedule, steps, "linspace", final="sigma_min")
    if grid.stages or len(set(grid.lambdas)) < len(grid.lambdas):
        raise ValueError(
            "compensation is for one call at each node; use a multistep solver, final='zero' or 'sigma_min'"
        )
    ratios = [1.0] * steps
    with torch.no_grad():
        for i in tqdm(range(order, steps), desc="dc", disable=not progress):
            # What the run knows before this step's ratio counts: it does not change while the ratio is searched.
            states, known = run(problem, tabulate(schedule, grid, solver, refine=compensation(ratios, order)), i + 1)
            step = _Step(problem, trajectory, grid, solver, ratios, i, order, [states[0], *known])
            ratios[i] = step.best(evaluations)
    table = tabulate(schedule, grid, solver, refine=compensation(ratios, order))
    return Found(table, {"ratios": ratios, "order": order})


@dataclass(frozen=True)
class _Step:
    """The search of one ratio: `basis` are the first sample and the predictions known so far."""

    problem: Problem
    trajectory: Trajectory
    grid: TimeGrid
    solver: Multistep
    ratios: Sequence[float]
    i: int
    order: int
    basis: list[Tensor]

    def best(self, evaluations: int) -> float:
        ratio = self._closed_form()
        if not self.solver.corrector or self.i + 1 == len(self.grid.timesteps):
            return ratio
        return minimised(self._corrected_error, ratio, BOUNDS, evaluations)

    def _weights(self, ratio: float) -> tuple[FloatArray, FloatArray | None]:
        """Of the next sample as predicted and as corrected, see `unrolled`."""
        tried = [*self.ratios[: self.i], ratio, *self.ratios[self.i + 1 :]]
        refine = compensation(tried, self.order)
        states, corrected = unrolled(self.problem.schedule, self.grid, self.solver, refine=refine)
        return states[self.i + 1], corrected[self.i + 1] if self.i + 1 < len(corrected) else None

    def _closed_form(self) -> float:
        """The least error of the predicted sample, a polynomial of degree 2 * order in the ratio."""
        target = self.trajectory.at(self.grid.lambdas[self.i + 1])
        vectors = torch.stack([v.double().flatten() for v in (*self.basis, target)])
        gram = (vectors @ vectors.T / vectors.shape[1]).numpy()
        at = np.linspace(*BOUNDS, self.order + 1)
        weights = np.stack([[*self._weights(r)[0][: len(self.basis)], -1.0] for r in at])
        coefficients = np.polynomial.polynomial.polyfit(at, weights, self.order)  # (order + 1, basis + 1)
        products = coefficients @ gram @ coefficients.T
        loss = np.polynomial.Polynomial(
            [np.trace(np.fliplr(products), k) for k in range(self.order, -self.order - 1, -1)]
        )
        turns = [float(r.real) for r in loss.deriv().roots() if abs(r.imag) < 1e-9 and BOUNDS[0] <= r.real <= BOUNDS[1]]
        return min([*BOUNDS, *turns], key=loss)

    def _corrected_error(self, ratio: float) -> float:
        predicted, corrected = self._weights(ratio)
        k = len(self.basis)
        x = _mixed(predicted[:k], self.basis)
        lam, time = self.grid.lambdas[self.i + 1], float(self.grid.timesteps[self.i + 1])
        assert corrected is not None
        found = _mixed(corrected[: k + 1], [*self.basis, self.problem.denoise(x, lam, time)])
        return float((found - self.trajectory.at(lam)).square().mean())


def _mixed(weights: FloatArray, tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([float(w) * t for w, t in zip(weights, tensors, strict=True)]).sum(0)


def minimised(f: Callable[[float], float], start: float, bounds: tuple[float, float], evaluations: int) -> float:
    """Where a smooth function of one number is least: three points around `start`, then parabolas through the best."""
    low, high = bounds
    tried = {float(np.clip(r, low, high)): 0.0 for r in (start, start - 0.2, start + 0.2, 1.0)}
    tried = {r: f(r) for r in list(tried)[:evaluations]}
    while len(tried) < evaluations:
        points = sorted(sorted(tried, key=tried.__getitem__)[:3])
        bend, slope, _ = np.polyfit(points, [tried[r] for r in points], 2)
        new = -slope / (2 * bend) if bend > 0 else 2 * min(tried, key=tried.__getitem__) - float(np.mean(points))
        new = float(np.clip(new, max(low, points[0] - 0.5), min(high, points[-1] + 0.5)))
        if min(abs(new - r) for r in tried) < 1e-4:
            break
        tried[new] = f(new)
    return min(tried, key=tried.__getitem__)
