"""Every deterministic solver on every schedule where the exact solution is known: Gaussian mixtures with exact scores.

`python benchmarks/solvers_analytic.py` writes results/solvers_analytic.md, .json and .png, in 1.5 minutes on one core.

A network without error: all of it is the solver's. What a trained network, which is rough in t and wrong far from its
data, makes of a solver is another question; `solvers.py` asks it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mixture import Mixtures
from solvers_analytic_report import write_report
from torch import Tensor

import diffaccel
from diffaccel.samplers.catalog import SCHEDULES
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.solvers import SOLVERS

HERE = Path(__file__).parent
FLOW_SCHEDULES = ("flow", "trailing", "beta57", "quadratic")
CALLS, SDE_CALLS = (4, 5, 6, 8, 10, 20, 40), (5, 10, 20, 50)
SAME = ("euler", "deis_rho2heun")  # other names of ddim and heun
ODE = tuple(n for n, rule in SOLVERS.items() if not rule.stochastic and n not in SAME)
SDE = tuple(n for n, rule in SOLVERS.items() if rule.stochastic)
VP = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
# Standard deviations inside a component, from the largest coordinate to the smallest. The second kind of data has no
# fine detail: is the ranking one of the data?
DATA = {"detailed": (0.6, 0.03), "smooth": (0.35, 0.35)}
SDE_MEAN, SDE_STD, SDE_SCHEDULES = 1.0, 0.5, ("karras", "logsnr")


@dataclass(frozen=True)
class Row:
    """Median RMSE of one solver on one grid, by network calls."""

    solver: str
    schedule: str
    final: str
    errors: dict[int, float]


@dataclass
class Found:
    """What was measured.

    Attributes:
        data: per kind of data its standard deviation, and how far the solution is from that of the ODE at sigma = 0
            and from that at sigma_min.
        rows: per kind of data, rows of the VP path; "flow": those of the flow path with the first data.
        refused: per schedule or solver that cannot run, what it says.
        stochastic: (solver, schedule) -> calls -> relative errors of mean and variance.
    """

    starts: tuple[int, int]
    data: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    stochastic: dict[tuple[str, str], dict[int, tuple[float, float]]] = field(default_factory=dict)
    draws: int = 0


def main(argv: Sequence[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", type=int, default=8)
    parser.add_argument("--noises", type=int, default=8, help="starting noises of each mixture")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--solvers", nargs="+", default=list(ODE))
    parser.add_argument("--schedules", nargs="+", default=[s for s in SCHEDULES if s != "flow"])
    parser.add_argument("--draws", type=int, default=2**18, help="samples of the stochastic solvers; 0: leave them out")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = Found((args.mixtures, args.noises), draws=args.draws)
    for kind, stds in DATA.items():
        generator = torch.Generator().manual_seed(0)
        mixtures = Mixtures.drawn(args.mixtures, stds, generator)
        noise = torch.randn(args.mixtures, args.noises, 64, generator=generator, dtype=torch.float64)
        schedule = diffaccel.scheduler("ddim", VP).schedule
        truth = mixtures.solution(noise, schedule)
        ends = [rmse(mixtures.ode(noise, schedule, end), truth) for end in (12.0, schedule.lambda_min_noise)]
        found.data[kind] = (float(truth.std()), ends[0], ends[1])
        found.rows[kind] = list(ranking(args, VP, args.schedules, mixtures, noise, truth, found.refused))
        if "flow" not in found.rows:
            truth = mixtures.solution(noise, diffaccel.scheduler("ddim", FLOW).schedule)
            found.rows["flow"] = list(ranking(args, FLOW, FLOW_SCHEDULES, mixtures, noise, truth, found.refused))
    if args.draws:
        for name, schedule in itertools.product(("ddim", *SDE), SDE_SCHEDULES):
            found.stochastic[name, schedule] = {n: gaussian(name, schedule, n, args.draws) for n in SDE_CALLS}
    write_report(found, args.output)
    return found


def ranking(
    args: argparse.Namespace,
    config: Mapping[str, Any],
    schedules: Sequence[str],
    mixtures: Mixtures,
    noise: Tensor,
    truth: Tensor,
    refused: dict[str, str],
) -> Iterator[Row]:
    """Rows of all solvers on all `schedules` and ends; a run to sigma_min that is the run to 0 is left out."""
    for solver, schedule in itertools.product(args.solvers, schedules):
        grids = set()
        for final in ("zero", "sigma_min"):
            scheduler = diffaccel.scheduler(solver, dict(config), schedule=schedule, final=final)
            errors = {}
            for n in args.calls:
                try:
                    scheduler.set_timesteps(n)
                except ValueError as reason:
                    refused.setdefault(schedule, str(reason))
                    continue
                if scheduler.grid.lambdas not in grids:
                    grids.add(scheduler.grid.lambdas)
                    errors[n] = rmse(sample(scheduler, mixtures, noise), truth)
            if errors:
                yield Row(solver, schedule, final, errors)


def sample(scheduler: SolverScheduler, mixtures: Mixtures, noise: Tensor) -> Tensor:
    """What `scheduler` makes of `noise`, through its public `step` and in float64."""
    x, schedule = noise, scheduler.schedule
    for lam, t in zip(scheduler.grid.lambdas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(mixtures.output(x, *schedule.alpha_sigma(lam), schedule.path), t, x, return_dict=False)[0]
    return x


def rmse(x: Tensor, truth: Tensor) -> float:
    """Median over the starting noises."""
    return float((x - truth).square().mean(-1).sqrt().median())


def gaussian(solver: str, schedule: str, calls: int, draws: int) -> tuple[float, float]:
    """Relative errors of the mean and variance of Gaussian data after a run from pure noise, as pipelines start."""
    scheduler = diffaccel.scheduler(solver, dict(VP), schedule=schedule)
    scheduler.set_timesteps(calls)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(draws, generator=generator, dtype=torch.float64)
    x = (x - x.mean()) / x.std()
    for lam, t in zip(scheduler.grid.lambdas[:-1], scheduler.timesteps, strict=True):
        alpha, sigma = scheduler.schedule.alpha_sigma(lam)
        total = alpha**2 * SDE_STD**2 + sigma**2
        x0 = (alpha * SDE_STD**2 * x + sigma**2 * SDE_MEAN) / total
        x = scheduler.step((x - alpha * x0) / sigma, t, x, generator=generator, return_dict=False)[0]
    return float(x.mean()) / SDE_MEAN - 1, float(x.var()) / SDE_STD**2 - 1


if __name__ == "__main__":
    main()
