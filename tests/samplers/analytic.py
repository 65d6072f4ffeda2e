"""A problem with a known answer: Gaussian-mixture data, whose exact x0 prediction has a closed form."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import solve_ivp

from diffaccel import SolverScheduler
from diffaccel.samplers.grid import TimeGrid
from diffaccel.samplers.plan import is_singlestep
from diffaccel.samplers.stages import with_stages

RNG = np.random.default_rng(0)
MEANS = RNG.normal(size=(3, 4)) * 1.2
VARIANCE = 0.35**2


def x0_prediction(y: np.ndarray, lam: float) -> np.ndarray:
    """E[x0 | y] of the mixture for y = x0 + exp(-lam) * eps of shape (4,)."""
    total = VARIANCE + np.exp(-2 * lam)
    logits = -((y - MEANS) ** 2).sum(1) / (2 * total)
    weights = np.exp(logits - logits.max())
    posterior = (VARIANCE * y + np.exp(-2 * lam) * MEANS) / total
    return weights @ posterior / weights.sum()


def exact(y: np.ndarray, nodes: np.ndarray, rate: Callable[[float], float] = lambda lam: 1.0) -> np.ndarray:
    """Solution of dy/dlambda = rate * (x0(y) - y) at `nodes`, from y at nodes[0]; rate 1 is the probability flow."""
    flow = solve_ivp(
        lambda lam, v: rate(lam) * (x0_prediction(v, lam) - v),
        (nodes[0], nodes[-1]),
        y,
        t_eval=nodes,
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
    )
    return flow.y.T


def place(scheduler: SolverScheduler, lam: np.ndarray) -> None:
    """Let the scheduler make its steps between the half log-SNR nodes `lam`, and then one to sigma = 0."""
    grid = TimeGrid((*map(float, lam), np.inf), scheduler.schedule.time_at(lam))
    scheduler._use(with_stages(scheduler.schedule, scheduler.solver, grid) if is_singlestep(scheduler.solver) else grid)


def run(scheduler: SolverScheduler, y: np.ndarray, exact_values: np.ndarray | None = None) -> np.ndarray:
    """y at the last node before sigma = 0, with the first rows of `exact_values` in place of the solver's own steps."""
    lam, alpha = scheduler.grid.lambdas, lambda v: scheduler.schedule.alpha_sigma(v)[0]
    x = torch.from_numpy(y[None] * alpha(lam[0]))
    for i, t in enumerate(scheduler.timesteps[:-1]):
        given = exact_values is not None and i < len(exact_values)
        if given:
            x = torch.from_numpy(exact_values[i][None] * alpha(lam[i]))
            scheduler._anchor = None  # nothing to correct: the value is exact
        p, q = scheduler._x0_of(lam[i])  # the network's output is what gives this x0
        out = (torch.from_numpy(x0_prediction(x.numpy()[0] / alpha(lam[i]), lam[i])[None]) - p * x) / q
        x_next = scheduler.step(out, t, x, return_dict=False)[0]
        if given:
            scheduler._anchor = x
        x = x_next
    return x.numpy()[0] / alpha(lam[len(scheduler.timesteps) - 1])


def slope(errors: list[float], steps: list[int]) -> float:
    """Observed order: minus the least-squares slope of log error against log steps."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])
