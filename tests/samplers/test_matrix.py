"""Every solver on every schedule with every kind of network: one matrix, covered by a fixed choice of runs.

The whole product (solvers x schedules x 9 kinds of network x 7 numbers of calls, less what is refused) is over 60,000
runs. Here each solver makes 63 of them, every network with every number of calls, and a few more. The schedule
goes round from one of these to the next and from solver to solver, so that all solvers together run every schedule with
every network and number of calls, and each solver runs every schedule: `test_the_choice_covers` looks. Nothing is drawn
at random.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

import diffaccel
from diffaccel import SolverScheduler
from diffaccel.samplers.catalog import SCHEDULES, SOLVERS
from diffaccel.samplers.spacing import FLOW_ONLY, NEVER_FLOW
from tests.samplers.point_mass import NETWORKS, X0, at_level, level, samples
from tests.tiny import relative

CALLS = (1, 2, 3, 5, 8, 20, 50)
# A published list is for networks trained on all of its range; EDM pipelines start at their own sigma besides.
WIDE = set(NETWORKS) - {"flow", "edm"}
LISTS = {
    "ays_sd15": WIDE,
    "ays_sdxl": WIDE,
    "gits_sd15": WIDE,
    "ays_svd": {"svd"},
    "ays_deepfloyd": {"svd", "cosine"},
}
Run = tuple[str, str, int]  # network, schedule, number of calls


def accepted(schedule: str, network: str) -> bool:
    if network == "flow":
        return schedule not in NEVER_FLOW
    return schedule not in FLOW_ONLY and network in LISTS.get(schedule, NETWORKS)


def choice(solver: str) -> list[Run]:
    place = list(SOLVERS).index(solver)
    chosen: list[Run] = []
    for i, network in enumerate(NETWORKS):
        known = [s for s in SCHEDULES if accepted(s, network)]
        chosen += [(network, known[(place + 7 * i + j) % len(known)], n) for j, n in enumerate(CALLS)]
    for schedule in set(SCHEDULES) - {schedule for _, schedule, _ in chosen}:
        networks = [network for network in NETWORKS if accepted(schedule, network)]
        chosen.append((networks[place % len(networks)], schedule, CALLS[place % len(CALLS)]))
    return chosen


def test_the_choice_covers() -> None:
    made = {solver: choice(solver) for solver in SOLVERS}
    pairs = [(network, schedule) for network in NETWORKS for schedule in SCHEDULES if accepted(schedule, network)]
    assert {(*pair, n) for pair in pairs for n in CALLS} == set(itertools.chain(*made.values()))
    for chosen in made.values():
        assert {(network, n) for network, _, n in chosen} == set(itertools.product(NETWORKS, CALLS))
        assert {schedule for _, schedule, _ in chosen} == set(SCHEDULES)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_run_is_exact_where_there_is_one_picture(solver: str) -> None:
    """N calls, finite, the same again for the same seed, and at the end the one picture that the network knows.

    In float64, where without noise every sample on the way is that picture with the noise of its level, so that each
    row counts; in float32 as far as its rounding allows, see `enlarged`.
    """
    for run in choice(solver):
        network, schedule, n = run
        scheduler = diffaccel.scheduler(solver, NETWORKS[network], schedule=schedule)
        results = []
        for dtype in (torch.float32, torch.float32, torch.float64):
            scheduler.set_timesteps(n)
            start = at_level(scheduler, 0).to(dtype)
            results.append(torch.stack(samples(scheduler, start, torch.Generator().manual_seed(0))))
            assert len(scheduler.timesteps) == scheduler.step_index == n, run
        single, again, double = results
        assert single.isfinite().all(), run
        assert torch.equal(single, again), run
        assert scheduler.sigmas[-1] == 0, run
        assert relative(double[-1], X0) < 1e-5, run
        assert relative(single[-1], X0) < 1e-4 * enlarged(scheduler, network), run
        if not scheduler.solver.stochastic:
            for i in range(n):
                assert relative(double[i], at_level(scheduler, i)) < 1e-5, (run, i)


def enlarged(scheduler: SolverScheduler, network: str) -> float:
    """How much rows and network enlarge what float32 rounds off, 1 for most runs.

    Weights are of order 1, but for extrapolations far beyond the nodes (the second half of linear_quadratic: 1e5) and
    for SDE-DPM-Solver, which keeps the noise of its start. The x0 of an epsilon network has the rounding of its output
    times sigma / alpha, which is 20,000 in the first call of cosine betas.
    """
    weights = np.abs(scheduler._rows[:, scheduler._layout.correct.start : scheduler._layout.noise]).sum(1).max()
    alpha, sigma = level(scheduler, 0)
    return max(1.0, weights) * (sigma / alpha / 500 if network == "cosine" else 1.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_schedule_of_other_networks_is_refused(solver: str) -> None:
    for network, schedule in itertools.product(NETWORKS, SCHEDULES):
        if accepted(schedule, network):
            continue
        with pytest.raises(ValueError, match=r"is (not )?for flow-matching|this network was trained from") as caught:
            diffaccel.scheduler(solver, NETWORKS[network], schedule=schedule).set_timesteps(8)
        assert re.search(r"; use \w+", str(caught.value)), (network, schedule)
