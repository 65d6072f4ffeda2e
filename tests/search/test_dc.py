"""DC-Solver's search: closed form against a scan, planted ratios, random search."""

import numpy as np
import pytest
import torch

from diffaccel.samplers.compensation import compensation
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search.dc import UNIPC, dc, minimised
from diffaccel.samplers.search.reference import Trajectory, reference
from diffaccel.samplers.search.rollout import mse, rollout, run
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import tabulate, unrolled
from tests.search.problems import SCHEDULES, mixture

PREDICTORS = ["dpmpp_2m", "ddim", "deis_tab2"]


def grid_of_run(schedule, n):
    return time_grid(schedule, n, "linspace", final="sigma_min")


def planted(problem, solver, ratios):
    """A trajectory that passes through the nodes of the run with these ratios, as its corrector leaves them."""
    schedule, grid = problem.schedule, grid_of_run(problem.schedule, len(ratios))
    refine = compensation(ratios)
    states, corrected = unrolled(schedule, grid, solver, refine=refine)
    first, known = run(problem, tabulate(schedule, grid, solver, refine=refine))
    basis = torch.stack([first[0], *known])
    x = [torch.tensordot(torch.from_numpy(w), basis, 1) for w in (*corrected, states[-1])]
    return Trajectory(schedule, np.array(grid.lambdas), torch.stack(x), torch.zeros(len(x), *x[0].shape))


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("name", [*PREDICTORS, "unipc"])
def test_recovers_planted_ratios(name, path):
    problem, ratios = mixture(SCHEDULES[path], 8), [1.0, 1.0, 0.85, 1.2, 0.9, 1.1]
    found = dc(problem, planted(problem, SOLVERS[name], ratios), 6, solver=SOLVERS[name], progress=False)
    np.testing.assert_allclose(found.notes["ratios"], ratios, rtol=0.02)
    grid = grid_of_run(problem.schedule, 6)
    refine = compensation(found.notes["ratios"])
    assert found.table.rows == tabulate(problem.schedule, grid, SOLVERS[name], refine=refine).rows


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("name", PREDICTORS)
def test_the_closed_form_is_the_best_of_a_scan(name, path):
    """Of three steps only the last has a ratio, and it decides the end: every hundredth is run in full."""
    problem = mixture(SCHEDULES[path], 8)
    trajectory = reference(problem, 60, progress=False)
    found = dc(problem, trajectory, 3, solver=SOLVERS[name], progress=False)
    grid = grid_of_run(problem.schedule, 3)

    def error(ratio):
        table = tabulate(problem.schedule, grid, SOLVERS[name], refine=compensation([1.0, 1.0, ratio]))
        return float(mse(rollout(problem, table), trajectory.at(grid.lambdas[-1])).mean())

    tried = np.linspace(0, 2, 201)
    best = min(tried, key=error)
    assert abs(found.notes["ratios"][-1] - best) <= 0.0051
    assert error(found.notes["ratios"][-1]) <= error(best) * (1 + 1e-9)


def test_a_ratio_with_a_corrector_is_the_best_of_a_scan():
    """Of four steps the third: what counts is the sample at the fourth node, once it is corrected."""
    problem = mixture(SCHEDULES["vp"], 8)
    trajectory = reference(problem, 60, progress=False)
    found = dc(problem, trajectory, 4, evaluations=12, progress=False).notes["ratios"]
    grid, target = grid_of_run(problem.schedule, 4), None

    def error(ratio):
        refine = compensation([1.0, 1.0, ratio, 1.0])
        states, known = run(problem, tabulate(problem.schedule, grid, UNIPC, refine=refine), 4)
        corrected = unrolled(problem.schedule, grid, UNIPC, refine=refine)[1][3]
        x = torch.tensordot(torch.from_numpy(corrected), torch.stack([states[0], *known]), 1)
        return float((x - target).square().mean())

    target = trajectory.at(grid.lambdas[3])
    best = min(np.linspace(0, 2, 201), key=error)
    assert abs(found[2] - best) < 0.02
    assert error(found[2]) <= error(best) * 1.001


def test_predictors_cost_no_more_than_runs():
    """One partial run for each ratio; a corrector adds `evaluations` calls, but for the last ratio."""
    problem = mixture(SCHEDULES["vp"], 4)
    trajectory = reference(problem, 30, progress=False)
    problem.spent = 0
    dc(problem, trajectory, 5, solver=SOLVERS["dpmpp_2m"], progress=False)
    assert problem.spent == 4 * (3 + 4 + 5)
    problem.spent = 0
    dc(problem, trajectory, 5, evaluations=6, progress=False)
    assert problem.spent <= 4 * (3 + 4 + 5 + 2 * 6)


@pytest.mark.parametrize("name", ["unipc", "dpmpp_2m"])
def test_beats_random_search_at_equal_calls(name):
    problem = mixture(SCHEDULES["vp"])
    trajectory = reference(problem, 60, progress=False)
    problem.spent = 0
    found = dc(problem, trajectory, 6, solver=SOLVERS[name], progress=False)
    runs, grid = problem.spent // (6 * len(problem)), grid_of_run(problem.schedule, 6)

    def error(ratios):
        table = tabulate(problem.schedule, grid, SOLVERS[name], refine=compensation(ratios))
        return float(mse(rollout(problem, table), trajectory.at(grid.lambdas[-1])).mean())

    rng, best = np.random.default_rng(0), []
    for _ in range(10):
        best.append(min(error([1.0, 1.0, *rng.normal(1, 0.2, 4)]) for _ in range(runs)))
    ours = error(found.notes["ratios"])
    assert ours < np.median(best)
    assert ours < 0.8 * error([1.0] * 6)


def test_few_steps_have_no_ratios():
    problem = mixture(SCHEDULES["vp"], 2)
    trajectory = reference(problem, 20, progress=False)
    for n in (1, 2):
        found = dc(problem, trajectory, n, progress=False)
        assert found.notes == {"ratios": [1.0] * n, "order": 2}
        assert found.table.rows == tabulate(problem.schedule, grid_of_run(problem.schedule, n), UNIPC).rows


def test_grids_that_call_twice_are_refused():
    problem = mixture(SCHEDULES["vp"], 2)
    trajectory = reference(problem, 20, progress=False)
    grid = time_grid(problem.schedule, 5, "beta", final="corrector")
    with pytest.raises(ValueError, match="one call at each node"):
        dc(problem, trajectory, 5, grid=grid, progress=False)


@pytest.mark.parametrize(("least", "start"), [(0.93, 1.0), (1.6, 0.9), (0.2, 1.3), (2.5, 1.0), (-1.0, 1.0)])
def test_minima_are_found_in_few_values(least, start):
    asked = []

    def f(r):
        asked.append(r)
        return (r - least) ** 2 + 0.2 * np.sin(r - least) ** 4

    found = minimised(f, start, (0.0, 2.0), 8)
    assert len(asked) <= 8
    assert min(asked) >= 0
    assert max(asked) <= 2
    assert found == pytest.approx(np.clip(least, 0, 2), abs=0.02)
