"""Ours: nodes, what the network is told at them, and all weights of the table, learned together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from torch import Tensor

from diffaccel.samplers.er_sde import ERSDE
from diffaccel.samplers.grid import TimeGrid, time_grid
from diffaccel.samplers.search.iia import DDIM, fitted_run
from diffaccel.samplers.search.learned import Learned
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory
from diffaccel.samplers.search.rollout import errors, mse
from diffaccel.samplers.tabulate import Found, Table

SOLVER = ERSDE(
    order=1, noise_scale="ode", corrector=True
)  # weights that move with the nodes; the learned ones come on top
SPACINGS = ("beta", "linspace", "logsnr", "karras", "trailing")  # where the search begins
FLOW_SPACINGS = ("beta", "flow", "logsnr", "linear_quadratic")
FLOOR = 1e-6  # squared error below which a pair counts no more


def auto(
    problem: Problem,
    trajectory: Trajectory,
    steps: int,
    *,
    rounds: int = 12,
    iterations: int = 60,
    batch: int = 16,
    rate: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> Found:
    """Learn everything that a sampler of `steps` calls has: a non-stationary solver, fit to the reference.

    Three stages, each from the best of the one before, with a quarter of the pairs kept aside to choose with:

    1. the weights of every step by least squares against the reference at its end (`iia` with all terms), on the
       nodes of five schedules;
    2. nodes and what the network is told at them by an evolution strategy, with those least squares inside: `rounds`
       generations of eight runs each. No gradients: this much any network that runs can have;
    3. all together by gradient descent through the network (Adam), `iterations` of `batch` pairs. The weights of the
       solver are plain functions of the nodes, whatever it is: they move along with them.

    The loss is the mean logarithm of the error at the end of the run, so that no few hard pairs decide.

    Learned solvers: bespoke non-stationary (arXiv:2403.01329), S4S (arXiv:2502.17423), LD3 (arXiv:2405.15506), which
    learns times alone, and GAS. Ours differ in the least squares, which spare most of the descent; in a last row to
    sigma = 0 that is learned as the others are; and in that nothing is relaxed: the starts stay what they are.

    Args:
        problem: pairs to fit, four at least; thirty or more.
        trajectory: their reference.
        steps: network calls.
        rounds: generations of the second stage; 0 leaves it out.
        iterations: of the third stage; 0 leaves it out, and where memory does not suffice for gradients it is left.
        batch: pairs of an iteration.
        rate: of Adam, on nodes; half as much on weights.
        seed: of what is drawn.
        progress: show progress bars.

    Returns:
        The table; `history` in the notes: stage, and the error (geometric mean) on the pairs kept aside.

    Raises:
        ValueError: for fewer than four pairs.
    """
    if len(problem) < 4:
        raise ValueError(f"auto fits on some pairs and chooses by others: give it four or more, not {len(problem)}")
    chosen = torch.arange(len(problem)) % 4 == 3
    fit, other = (_Part(problem.part(rows), trajectory.part(rows)) for rows in (~chosen, chosen))
    best = _first(fit, other, steps)
    history = [("least squares", other.error(best))]
    if rounds:
        better = _evolved(fit, best, steps, rounds, np.random.default_rng(seed), progress)
        history.append(("evolution", other.error(better)))
        best = min(best, better, key=other.error)
    if iterations:
        draw = torch.Generator().manual_seed(seed)
        try:
            best = _descended(fit, other, best, iterations, batch, rate, draw, history, progress)
        except torch.OutOfMemoryError:
            warnings.warn(
                "there is no memory for gradients: what was found without them is kept; a smaller batch needs less",
                stacklevel=2,
            )
    problem.spent += fit.problem.spent + other.problem.spent
    return Found(best, {"history": history})


@dataclass(frozen=True)
class _Part:
    """Pairs, and their reference."""

    problem: Problem
    trajectory: Trajectory

    def error(self, table: Table) -> float:
        """Geometric mean of the squared error."""
        return _mean(errors(self.problem, table, self.trajectory))

    def fitted(self, grid: TimeGrid) -> tuple[Table, float]:
        """Weights by least squares, and the error that they leave."""
        found, x = fitted_run(self.problem, self.trajectory, grid, DDIM, "all")
        return found.table, _mean(mse(x, self.trajectory.end))


def _mean(errors: Tensor) -> float:
    return float((errors + FLOOR).log().mean().exp())


def _first(fit: _Part, other: _Part, steps: int) -> Table:
    schedule = fit.problem.schedule
    spacings = FLOW_SPACINGS if schedule.path == "flow" else SPACINGS
    grids = [time_grid(schedule, steps, spacing) for spacing in spacings]
    return min((fit.fitted(grid)[0] for grid in grids), key=other.error)


def _evolved(fit: _Part, table: Table, steps: int, rounds: int, rng: np.random.Generator, progress: bool) -> Table:
    """A (4, 8) evolution strategy with a spread for each number (sep-CMA without paths)."""
    learned = Learned.of(fit.problem.schedule, table)
    mean, spread = learned.placement(), np.full(2 * steps, 0.15)
    spread[steps:] = 0.05  # what is told differs little from what is so
    weights = np.log(4.5) - np.log(np.arange(1, 5))
    weights /= weights.sum()
    best, least = table, fit.error(table)
    for _ in tqdm(range(rounds), desc="auto: nodes", disable=not progress):
        found = []
        drawn = rng.standard_normal((4, len(mean)))
        for z in (*drawn, *-drawn):
            tried, error = fit.fitted(learned.placed(mean + spread * z))
            found.append((error, z, tried))
        found.sort(key=lambda item: item[0])
        if found[0][0] < least:
            least, _, best = found[0]
        z = np.stack([item[1] for item in found[:4]])
        mean = mean + spread * (weights @ z)
        spread = spread * np.exp(0.2 * (weights @ z**2 - 1)).clip(0.7, 1.3)
    return best


def _descended(
    fit: _Part,
    other: _Part,
    table: Table,
    iterations: int,
    batch: int,
    rate: float,
    draw: torch.Generator,
    history: list[tuple[str, float]],
    progress: bool,
) -> Table:
    learned = Learned.of(fit.problem.schedule, table, SOLVER)
    groups = [{"params": [learned.spread, learned.told], "lr": rate}, {"params": [learned.weights], "lr": rate / 2}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    best, least = table, other.error(table)
    bar = tqdm(range(iterations), desc="auto: descent", disable=not progress)
    for i in bar:
        rows = torch.randperm(len(fit.problem), generator=draw)[:batch]
        part = fit.problem.part(rows)
        with torch.enable_grad():
            loss = learned.loss(part, fit.trajectory.part(rows).end, FLOOR)
            adam.zero_grad()
            loss.backward()
        fit.problem.spent += 3 * part.spent  # a backward pass is as much work as two forward ones
        adam.step()
        slower.step()
        if i % 10 == 9 or i + 1 == iterations:
            now = learned.table()
            error = other.error(now)
            history.append(("descent", error))
            bar.set_postfix(error=f"{error:.4f}")
            if error < least:
                best, least = now, error
    return best
