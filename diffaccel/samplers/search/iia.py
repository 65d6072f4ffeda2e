"""Improved integration approximation: per-step weights by least squares, against finer steps or the reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from torch import Tensor

from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.grid import TimeGrid, time_grid
from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory
from diffaccel.samplers.search.rollout import advanced
from diffaccel.samplers.solver import Multistep
from diffaccel.samplers.tabulate import Found, Table, rows_of, unrolled

Terms = Literal["differences", "epsilon", "all"]
Target = Literal["substeps", "trajectory"]
DDIM = ExponentialAdams(order=1)
RIDGE = 1e-8


def iia(
    problem: Problem,
    trajectory: Trajectory,
    steps: int,
    *,
    solver: Multistep = DDIM,
    grid: TimeGrid | None = None,
    terms: Terms = "differences",
    target: Target = "trajectory",
    substeps: int = 10,
    progress: bool = True,
) -> Found:
    """Add to each step of a solver what lessens its error most, by least squares over all pairs and numbers.

    IIA (arXiv:2304.11328). Steps are fitted one after the other, each from the samples that the fitted ones before it
    lead to. In terms of y = x / alpha a step gets

    - `differences`: phi_0 (x0_i - x0_{i-1}) + phi_1 (eps_i - eps_{i-1}), from the second step on (IIA-DDIM, eq. 6);
    - `epsilon`: beta eps_i, from the first (eq. 8, the paper's form with guidance);
    - `all`: any weights on the sample and on all predictions so far. Ours: the best linear step there is, once.

    The normal equations are over every pair and number at once; a port in circulation averages the pairs before it
    solves, and so fits the mean picture.

    Args:
        problem: pairs to fit.
        trajectory: their reference.
        steps: network calls.
        solver: multistep, deterministic; the paper takes DDIM.
        grid: default: even in log-SNR, ending at sigma = 0.
        terms: see above.
        target: what a step should arrive at: `substeps`, the paper's: `substeps` steps of the solver without history
            from where it starts; or `trajectory`, the reference there, which costs no calls and also mends what
            earlier steps did wrong.
        substeps: M in the paper.
        progress: show a progress bar over steps.

    Returns:
        The table; `coefficients` in the notes, those of each step in the order above.
    """
    grid = grid or time_grid(problem.schedule, steps, "logsnr")
    if grid.stages or len(set(grid.lambdas)) < len(grid.lambdas):
        raise ValueError("iia is for one call at each node; use a multistep solver, final='zero' or 'sigma_min'")
    found, _ = fitted_run(
        problem, trajectory, grid, solver, terms, substeps if target == "substeps" else 0, progress=progress
    )
    return Found(found.table, found.notes | {"terms": terms, "target": target})


@torch.no_grad()
def fitted_run(
    problem: Problem,
    trajectory: Trajectory,
    grid: TimeGrid,
    solver: Multistep,
    terms: Terms,
    substeps: int = 0,
    *,
    progress: bool = False,
) -> tuple[Found, Tensor]:
    """What `iia` does, and the samples at the end of the run that it was fitted on; `substeps` 0: the trajectory."""
    schedule, steps = problem.schedule, len(grid.timesteps)
    alphas = [schedule.alpha_sigma(lam)[0] for lam in grid.lambdas]
    plain = rows_of(schedule, grid.lambdas, unrolled(schedule, grid, solver)[0])
    x, known = problem.noise, []
    fitted: list[list[float]] = []
    history: list[FloatArray] = [np.eye(1, steps + 1)[0] / alphas[0]]  # y in symbols
    for i in tqdm(range(steps), desc="iia", disable=not progress):
        lam, end = grid.lambdas[i], grid.lambdas[i + 1]
        known.append(problem.denoise(x, lam, float(grid.timesteps[i])))
        wanted = _substeps(problem, x, lam, end, substeps) if substeps else trajectory.at(end)
        basis = [problem.noise, *known]
        columns = _terms(terms, grid, history, i, steps)
        gap = (wanted - advanced(plain[i], x, known, alphas[i], alphas[i + 1])) / alphas[i + 1]
        found = _least_squares([_mixed(c, basis) for c in columns], gap)
        y = plain[i][0] * history[-1] + _padded(plain[i][1:], i, steps)
        history.append(y + sum((c * w for c, w in zip(columns, found, strict=True)), np.zeros(steps + 1)))
        x = alphas[i + 1] * _mixed(history[-1], basis)
        fitted.append(found)
    rows = rows_of(schedule, grid.lambdas, [y * alpha for y, alpha in zip(history, alphas, strict=True)])
    return Found(Table(grid, rows), {"coefficients": fitted}), x


def _terms(terms: Terms, grid: TimeGrid, history: Sequence[FloatArray], i: int, n: int) -> list[FloatArray]:
    """What step i may add, in symbols: weights over the first sample and all predictions."""
    x0 = [np.eye(1, n + 1, 1 + j)[0] for j in range(i + 1)]
    epsilon = [(history[j] - x0[j]) * np.exp(grid.lambdas[j]) for j in range(i + 1)]
    if terms == "epsilon":
        return [epsilon[i]]
    if terms == "all":
        return [history[i], *x0]
    return [x0[i] - x0[i - 1], epsilon[i] - epsilon[i - 1]] if i else []


def _padded(weights: Sequence[float], i: int, n: int) -> FloatArray:
    """Weights of the newest prediction first, as a symbol."""
    out = np.zeros(n + 1)
    out[1 : i + 2] = weights[::-1]
    return out


def _least_squares(columns: Sequence[Tensor], wanted: Tensor) -> list[float]:
    """Weights of the columns whose sum is nearest to `wanted`; with a ridge (`RIDGE`) of their mean square."""
    if not columns:
        return []
    matrix = torch.stack([c.double().flatten() for c in columns])
    scale = matrix.square().mean(1).sqrt().clamp(min=1e-30)  # samples at high noise are large
    matrix = matrix / scale[:, None]
    gram = matrix @ matrix.T
    ridge = RIDGE * float(gram.diagonal().mean()) * torch.eye(len(columns), dtype=torch.float64)
    return (torch.linalg.solve(gram + ridge, matrix @ wanted.double().flatten()) / scale).tolist()


def _mixed(weights: FloatArray, tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([float(w) * t for w, t in zip(weights[: len(tensors)], tensors, strict=True)]).sum(0)


def _substeps(problem: Problem, x: Tensor, lam: float, end: float, count: int) -> Tensor:
    """`count` DDIM steps, even in log-SNR; to sigma = 0 over the least noise trained."""
    schedule = problem.schedule
    last = min(end, max(schedule.lambda_min_noise, lam))
    levels = [*np.linspace(lam, last, count + (last == end)), *([] if last == end else [end])]
    for here, there in itertools.pairwise(levels):
        x0 = problem.denoise(x, float(here))
        (a, b), (c, d) = schedule.alpha_sigma(float(here)), schedule.alpha_sigma(float(there))
        x = c * x0 + d / b * (x - a * x0)
    return x
