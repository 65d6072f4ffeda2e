"""GITS: the grid on which Euler steps stay closest to the reference trajectory, found by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from diffusers.utils.logging import tqdm

from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory
from diffaccel.samplers.search.rollout import errors
from diffaccel.samplers.solver import Multistep
from diffaccel.samplers.tabulate import Found, Table, grid_of, tabulate

Cost = Literal["dev", "l1", "l2"]
COEFFICIENTS = (0.8, 0.9, 1.0, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5)  # of the public tables (ComfyUI); the paper's is 1.15


def gits(
    problem: Problem,
    trajectory: Trajectory,
    steps: int,
    *,
    solver: Multistep,
    cost: Cost = "dev",
    coeff: float | Sequence[float] = COEFFICIENTS,
    progress: bool = True,
) -> Found:
    """Grid of `steps` calls at nodes of the trajectory, by GITS (arXiv:2405.11326), with the rows of `solver`.

    The cost of every Euler step between two nodes is known from the trajectory alone; the cheapest path of `steps`
    of them is exact, in seconds. All is measured in y = x / alpha, on every path. Where we depart: runs end at
    sigma = 0 (the paper's at the least noise, which its users replace by 0), candidates are the trajectory's own nodes
    (the paper has 61, EDM's rho = 7), and among several `coeff` the samples decide, by the geometric mean of
    their errors: each different grid is run once, at `steps` calls a pair.

    Args:
        problem: pairs of the trajectory. The network is called only to choose between coefficients.
        trajectory: reference, of `steps` or more nodes.
        steps: network calls.
        solver: a deterministic multistep solver.
        cost: of a step that lands beside the trajectory: `dev`, how much further it is from the chord between
            the trajectory's ends than the trajectory itself; `l1` and `l2`, the norm of the difference.
        coeff: weight of the later steps' costs against the first's, per step, > 0. One number calls no network.
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown cost, a coeff that is not positive, more steps than nodes, a singlestep solver.
    """
    tried = (coeff,) if isinstance(coeff, int | float) else tuple(coeff)
    if not tried or not all(c > 0 for c in tried):
        raise ValueError(f"coeff must be a positive number or several, such as 1.15, not {coeff!r}")
    if not 1 <= steps <= len(trajectory.lambdas):
        raise ValueError(
            f"steps must be between 1 and the {len(trajectory.lambdas)} nodes of the reference trajectory, not {steps}"
        )
    costs = jump_costs(trajectory, cost, progress)
    paths = {float(c): cheapest_path(costs, steps, c) for c in tried}
    found = {tuple(path): table_at(trajectory.schedule, trajectory.lambdas[path], solver) for path in paths.values()}
    notes = {"method": "gits", "cost": cost, "paths": {f"{c:g}": path for c, path in paths.items()}}
    best = next(iter(found))
    if len(found) > 1:
        judged = {
            path: float(errors(problem, table, trajectory).log().mean().exp())
            for path, table in tqdm(found.items(), desc="gits: runs", disable=not progress)
        }
        best = min(judged, key=lambda path: judged[path])
        notes["errors"] = {f"{c:g}": judged[tuple(path)] for c, path in paths.items()}
    chosen = next(c for c, path in paths.items() if tuple(path) == best)
    spent = [float(costs[i, j]) for i, j in pairwise((*best, len(costs) - 1))]
    notes |= {"coeff": chosen, "costs": spent, "sigmas": [float(np.exp(-trajectory.lambdas[i])) for i in best]}
    return Found(found[best], notes)


@torch.no_grad()
def jump_costs(trajectory: Trajectory, cost: Cost = "dev", progress: bool = False) -> FloatArray:
    """(K + 1, K + 1) mean costs of an Euler step in y from node i to node j > i; the last node is the end, sigma = 0.

    `dev` may be negative. Entries with j <= i are inf.
    """
    if cost not in ("dev", "l1", "l2"):
        raise ValueError(f"unknown cost {cost!r}; use dev, l1 or l2")
    sigmas, y, x0, eps = _frames(trajectory)
    count = len(sigmas)
    costs = np.full((count, count), np.inf)
    if cost == "dev":  # distances from the chord: from here on only what is across it
        chord = y[0] - y[-1]
        chord = chord / chord.norm(dim=1, keepdim=True).clamp_min(1e-300)
        end, eps = y[-1], _across(eps, chord)
        x0 = _across(x0 - end, chord)
        own = _across(y - end, chord).norm(dim=2)
        own[0] = 0  # as the chord starts there
    for i in tqdm(range(count - 1), desc="gits: costs", disable=not progress):
        for j in range(i + 1, count):
            landed = x0[i] + sigmas[j] * eps[i]  # y_i + (sigma_j - sigma_i) * eps_i, without the large terms
            if cost == "dev":
                each = landed.norm(dim=1) - own[j]
            else:
                each = torch.linalg.vector_norm(landed - y[j], ord=1 if cost == "l1" else 2, dim=1)
            costs[i, j] = float(each.mean())
    return costs


def cheapest_path(costs: FloatArray, steps: int, coeff: float) -> list[int]:
    """Nodes of the `steps` calls, from 0, with the least sum over steps k of coeff^k * cost; the last step ends at K.

    V[j, 1] = cost[j, K] and V[j, k] = min over i > j of cost[j, i] + coeff * V[i, k - 1] (GITS, algorithm 1).
    """
    value = costs[:, -1].copy()
    choices: list[FloatArray] = []
    for _ in range(steps - 1):
        through = costs[:, :-1] + coeff * value[None, :-1]
        choices.append(through.argmin(1))
        value = through.min(1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path


def _frames(trajectory: Trajectory) -> tuple[list[float], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sigmas (K + 1), and float64 (K + 1, B, d) y, (K, B, d) x0 and eps of the trajectory; the last y is the end."""
    levels = [trajectory.schedule.alpha_sigma(float(lam)) for lam in trajectory.lambdas]
    alpha, sigma = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in zip(*levels, strict=True))
    x, x0 = (v.detach().cpu().double().flatten(2) for v in (trajectory.x, trajectory.x0))
    eps = (x - alpha * x0) / sigma
    y = torch.cat([x / alpha, trajectory.end.detach().cpu().double().flatten(1)[None]])
    return [*(float(np.exp(-lam)) for lam in trajectory.lambdas), 0.0], y, x0, eps


def _across(v: torch.Tensor, chord: torch.Tensor) -> torch.Tensor:
    return v - (v * chord).sum(-1, keepdim=True) * chord


def table_at(schedule: NoiseSchedule, lambdas: FloatArray, solver: Multistep) -> Table:
    """The rows of `solver` for calls at half log-SNR `lambdas`, and then sigma = 0."""
    if hasattr(solver, "stages"):  # its steps have calls inside: `steps` nodes would not be `steps` calls
        raise ValueError(f"searched grids are for multistep solvers, not for {type(solver).__name__}")
    return tabulate(schedule, grid_of(schedule, lambdas), solver)
