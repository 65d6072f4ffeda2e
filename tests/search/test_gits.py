"""GITS: the dynamic programme against brute force, costs against their definition, a planted optimum, random search."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.exponential_runge_kutta import ExponentialRungeKutta
from diffaccel.samplers.schedule import NoiseSchedule, betas
from diffaccel.samplers.search.gits import cheapest_path, gits, jump_costs
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory, reference
from diffaccel.samplers.search.rollout import errors
from diffaccel.samplers.tabulate import grid_of, tabulate

SCHEDULES = {
    "vp": NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000))),
    "ve": NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 1000), "ve"),
    "flow": NoiseSchedule.rectified_flow(1000),
}
EULER = ExponentialAdams(order=1)
MEANS = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


def mixture_problem(schedule, pairs=16):
    """Data of five points with a std of 0.05: trajectories that turn."""

    def x0(x, lam, time, rows):
        alpha, sigma = (
            torch.tensor(v)[:, None] for v in zip(*(schedule.alpha_sigma(float(one)) for one in lam), strict=True)
        )
        y, s2 = x.double() / alpha, (sigma / alpha) ** 2
        means, inside = MEANS.double(), 0.05**2
        weights = torch.softmax((y @ means.T - means.square().sum(1) / 2) / (s2 + inside), dim=1)
        return ((inside * y + s2 * (weights @ means)) / (s2 + inside)).float()

    top = schedule.lambda_at(schedule.times[-1] - (schedule.path == "flow"))
    sigma = schedule.alpha_sigma(float(top))[1]
    return Problem(schedule, x0, sigma * torch.randn(pairs, 12, generator=torch.Generator().manual_seed(0)))


def broken_lines(schedule, kinks, count=12):
    """A trajectory whose y is straight in sigma between the nodes `kinks`, and what Euler's steps there land on."""
    generator = torch.Generator().manual_seed(1)
    lambdas = np.linspace(-2.0, 3.0, count)
    sigmas = [*np.exp(-lambdas), 0.0]
    y = [10 * torch.randn(4, 6, generator=generator, dtype=torch.float64)]
    eps = []
    for i in range(count):
        eps.append(torch.randn(4, 6, generator=generator, dtype=torch.float64) if i in kinks else eps[-1])
        y.append(y[-1] + (sigmas[i + 1] - sigmas[i]) * eps[i])
    alphas = [schedule.alpha_sigma(float(v))[0] for v in lambdas]
    x = torch.stack([a * v for a, v in zip(alphas, y[:-1], strict=True)])
    x0 = torch.stack([v - s * e for v, s, e in zip(y[:-1], sigmas[:-1], eps, strict=True)])
    return Trajectory(schedule, lambdas, x, x0)


def total(costs, path, coeff):
    return sum(coeff**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise((*path, len(costs) - 1))))


@pytest.mark.parametrize("coeff", [0.8, 1.15])
@pytest.mark.parametrize("cost", ["dev", "l1", "l2"])
def test_the_path_is_the_best_of_all_subsets(cost, coeff):
    schedule = SCHEDULES["vp"]
    costs = jump_costs(reference(mixture_problem(schedule), 11, progress=False), cost)
    for steps in (1, 2, 4, 7, 11):
        every = [(0, *rest) for rest in itertools.combinations(range(1, 11), steps - 1)]
        best = min(every, key=lambda path: total(costs, path, coeff))
        found = cheapest_path(costs, steps, coeff)
        assert total(costs, found, coeff) == pytest.approx(total(costs, best, coeff), rel=1e-12)
        assert found == list(best)


@pytest.mark.parametrize("name", SCHEDULES)
def test_costs_are_what_the_paper_says(name):
    """Written out in numpy, in y = x / alpha, for one pair of nodes at a time."""
    schedule = SCHEDULES[name]
    trajectory = reference(mixture_problem(schedule), 9, progress=False)
    alphas, sigmas = np.array([schedule.alpha_sigma(v) for v in trajectory.lambdas]).T
    x, x0 = trajectory.x.double().numpy(), trajectory.x0.double().numpy()
    y = np.concatenate([x / alphas[:, None, None], x0[-1:]])
    noise = np.append(sigmas / alphas, 0.0)

    def deviation(z):
        towards, chord = y[-1] - z, y[-1] - y[0]
        share = (towards * chord).sum(-1, keepdims=True) / (chord * chord).sum(-1, keepdims=True)
        return np.linalg.norm(towards - share * chord, axis=-1)

    found = {cost: jump_costs(trajectory, cost) for cost in ("dev", "l1", "l2")}
    for i, j in [(0, 1), (0, 5), (2, 3), (3, 8), (4, 9), (8, 9)]:
        slope = (y[i] - x0[i]) / noise[i]
        landed = y[i] + (noise[j] - noise[i]) * slope
        assert found["l1"][i, j] == pytest.approx(np.abs(landed - y[j]).sum(-1).mean(), rel=1e-4, abs=1e-4)
        assert found["l2"][i, j] == pytest.approx(np.linalg.norm(landed - y[j], axis=-1).mean(), rel=1e-4, abs=1e-4)
        assert found["dev"][i, j] == pytest.approx((deviation(landed) - deviation(y[j])).mean(), rel=1e-4, abs=1e-4)
    assert np.isinf(found["dev"][np.tril_indices(10)]).all()


@pytest.mark.parametrize("cost", ["l1", "l2"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_recovers_planted_nodes_without_a_network_call(name, cost):
    schedule, kinks = SCHEDULES[name], (0, 2, 3, 7, 10)
    problem = mixture_problem(schedule, 4)
    found = gits(problem, broken_lines(schedule, kinks), 5, solver=EULER, cost=cost, coeff=1.15, progress=False)
    np.testing.assert_allclose(found.table.lambdas[:-1], np.linspace(-2.0, 3.0, 12)[list(kinks)], rtol=1e-12)
    assert math.isinf(found.table.lambdas[-1])
    assert problem.spent == 0
    assert found.notes["costs"] == pytest.approx([0] * 5, abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_several_coefficients_are_judged_by_their_samples(name):
    problem = mixture_problem(SCHEDULES[name])
    trajectory = reference(problem, 40, progress=False)
    solver, tried = ExponentialAdams(order=2), (0.5, 1.0, 1.15, 2.0)
    alone = [gits(problem, trajectory, 6, solver=solver, coeff=c, progress=False) for c in tried]
    each = [float(errors(problem, one.table, trajectory).log().mean().exp()) for one in alone]
    found = gits(problem, trajectory, 6, solver=solver, coeff=tried, progress=False)
    assert max(each) > 1.1 * min(each)  # or there is nothing to choose
    assert float(errors(problem, found.table, trajectory).log().mean().exp()) == min(each)
    assert found.notes["coeff"] == tried[int(np.argmin(each))]
    # its rows are the solver's on that grid
    grid = grid_of(problem.schedule, found.table.lambdas[:-1])
    assert found.table.rows == tabulate(problem.schedule, grid, solver).rows


@pytest.mark.parametrize("name", SCHEDULES)
def test_beats_random_nodes_at_equal_calls(name):
    """As many random subsets of the same nodes as the search runs grids; medians over ten tries."""
    problem = mixture_problem(SCHEDULES[name])
    trajectory = reference(problem, 40, progress=False)
    problem.spent = 0
    found = gits(problem, trajectory, 6, solver=EULER, progress=False)
    runs = problem.spent // (6 * len(problem))
    generator = np.random.default_rng(0)
    best = []
    for _ in range(10):
        paths = [[0, *np.sort(generator.choice(np.arange(1, 40), 5, replace=False))] for _ in range(runs)]
        tables = [tabulate(problem.schedule, grid_of(problem.schedule, trajectory.lambdas[p]), EULER) for p in paths]
        best.append(min(float(errors(problem, table, trajectory).mean()) for table in tables))
    assert float(errors(problem, found.table, trajectory).mean()) < np.median(best)


def test_bad_input_gets_a_sentence():
    problem = mixture_problem(SCHEDULES["vp"], 2)
    trajectory = reference(problem, 5, progress=False)
    with pytest.raises(ValueError, match="between 1 and the 5 nodes"):
        gits(problem, trajectory, 6, solver=EULER, progress=False)
    with pytest.raises(ValueError, match="coeff must be a positive number"):
        gits(problem, trajectory, 3, solver=EULER, coeff=0.0, progress=False)
    with pytest.raises(ValueError, match="unknown cost 'l3'"):
        gits(problem, trajectory, 3, solver=EULER, cost="l3", progress=False)
    with pytest.raises(ValueError, match="multistep solvers"):
        gits(problem, trajectory, 3, solver=ExponentialRungeKutta(), progress=False)
