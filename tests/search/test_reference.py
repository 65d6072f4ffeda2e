"""References: they converge, are right between their nodes, and survive an interruption."""

import math

import numpy as np
import pytest
import torch

from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import reference
from diffaccel.samplers.search.rollout import errors
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import grid_of, tabulate
from tests import tiny
from tests.search.problems import SCHEDULES, gaussian, mixture

STD = 0.5


def gaussian_at(problem: Problem, lam: float) -> torch.Tensor:
    """Exact sample at half log-SNR `lam` from the start: its std over that of the start."""
    first, here = (problem.schedule.alpha_sigma(v) for v in (float(problem.schedule.lambdas[-1]), lam))
    return problem.noise * math.hypot(STD * here[0], here[1]) / math.hypot(STD * first[0], first[1])


@pytest.mark.parametrize("path", SCHEDULES)
def test_it_converges_to_the_exact_solution_in_third_order(path):
    """A Gaussian's solution scales the start; the last step, from the least noise trained, is a first-order one."""
    problem = gaussian(SCHEDULES[path], std=STD)
    last = problem.schedule.lambda_min_noise
    wanted = gaussian_at(problem, last)
    found = [reference(problem, n, progress=False) for n in (50, 100)]
    wrong = [tiny.relative(one.x[-1], wanted) for one in found]
    assert wrong[1] < 3e-4
    assert math.log2(wrong[0] / wrong[1]) > 2.5
    alpha, sigma = problem.schedule.alpha_sigma(last)
    assert tiny.relative(found[1].end, wanted * STD**2 * alpha / (STD**2 * alpha**2 + sigma**2)) < 3e-4


@pytest.mark.parametrize("path", SCHEDULES)
def test_between_nodes_it_is_of_fourth_order(path):
    problem = gaussian(SCHEDULES[path], std=STD)
    low, high = float(problem.schedule.lambdas[-1]), problem.schedule.lambda_min_noise
    low = max(low, -5.0)  # pure noise of flows is an interval of its own, over which nothing happens
    wrong = []
    for n in (20, 40):
        trajectory = reference(problem, n, progress=False)
        exact = torch.stack([gaussian_at(problem, v) for v in trajectory.lambdas])
        x0 = [problem.denoise(x, float(v)) for x, v in zip(exact, trajectory.lambdas, strict=True)]
        trajectory = type(trajectory)(problem.schedule, trajectory.lambdas, exact, torch.stack(x0))
        asked = np.linspace(low, high, 57)
        wrong.append(max(tiny.relative(trajectory.at(float(v)), gaussian_at(problem, float(v))) for v in asked))
    assert wrong[1] < 1e-2
    assert math.log2(wrong[0] / wrong[1]) > 3.3


@pytest.mark.parametrize("path", SCHEDULES)
def test_at_nodes_it_is_the_nodes_own(path):
    trajectory = reference(mixture(SCHEDULES[path], 4), 12, progress=False)
    for i, lam in enumerate(trajectory.lambdas):
        torch.testing.assert_close(trajectory.at(float(lam)), trajectory.x[i])
        torch.testing.assert_close(trajectory.x0_at(float(lam)), trajectory.x0[i])
    torch.testing.assert_close(trajectory.at(math.inf), trajectory.end)
    middle = float(trajectory.lambdas[3:5].mean())
    torch.testing.assert_close(trajectory.x0_at(middle), trajectory.x0[3:5].mean(0))
    beyond = trajectory.at(float(trajectory.lambdas[-1]) + 5)
    assert tiny.relative(beyond, trajectory.end) < 0.01
    part = trajectory.part(torch.tensor([2, 0]))
    torch.testing.assert_close(part.at(0.1), trajectory.at(0.1)[[2, 0]])


def test_a_run_on_its_own_levels_has_no_error():
    """The same solver on the same grid: nothing is lost between table, run and trajectory."""
    problem = mixture(SCHEDULES["vp"], 3)
    trajectory = reference(problem, 30, progress=False)
    from diffaccel.samplers.search.reference import SOLVER

    table = tabulate(problem.schedule, grid_of(problem.schedule, trajectory.lambdas), SOLVER)
    assert float(errors(problem, table, trajectory).max()) < 1e-18
    coarse = tabulate(problem.schedule, grid_of(problem.schedule, trajectory.lambdas[::6]), SOLVERS["ddim"])
    found = errors(problem, coarse, trajectory)
    assert found.shape == (3,)
    assert float(found.min()) > 1e-6


def keyed(pairs: int = 6, key: str = "some weights") -> Problem:
    one = mixture(SCHEDULES["vp"], pairs, double=False)
    return Problem(one.schedule, one.function, one.noise, key=key, batch=2)


def test_it_goes_on_after_an_interruption(tmp_path, monkeypatch):
    wanted = reference(keyed(), 20, progress=False)
    problem = keyed()
    plain, calls = problem.function, 0

    def fragile(*args):
        nonlocal calls
        calls += 1
        if calls > 45:  # in the third of three batches
            raise KeyboardInterrupt
        return plain(*args)

    problem.function = fragile
    with pytest.raises(KeyboardInterrupt):
        reference(problem, 20, cache=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2  # and nothing under a temporary name
    again = keyed()
    found = reference(again, 20, cache=tmp_path, progress=False)
    assert again.spent == 2 * 20
    for name in ("x", "x0"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    free = keyed()
    reference(free, 20, cache=tmp_path, progress=False)
    assert free.spent == 0


def test_nothing_is_taken_from_others(tmp_path):
    """Other weights, steps or starts are other references; a problem without a key has none to share."""
    reference(keyed(), 10, cache=tmp_path, progress=False)
    other_start = keyed()
    other_start.noise = other_start.noise + 1
    for problem, steps in ((keyed(key="others"), 10), (keyed(), 11), (other_start, 10), (keyed(key=""), 10)):
        reference(problem, steps, cache=tmp_path, progress=False)
        assert problem.spent == 6 * steps
    assert len(list(tmp_path.iterdir())) == 3 * 4  # three batches of each, but for the one without a key
