"""What `auto` learns: its gradients, its tables there and back, a planted sampler, random search."""

import numpy as np
import pytest
import torch

from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search.auto import auto
from diffaccel.samplers.search.learned import Learned
from diffaccel.samplers.search.reference import Trajectory, reference
from diffaccel.samplers.search.rollout import errors, rollout
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import Table, grid_of, tabulate
from tests.search.problems import SCHEDULES, mixture

QUIET = {"progress": False}
SPACINGS = {"vp": ("logsnr", "beta", "trailing"), "ve": ("karras", "beta"), "flow": ("flow", "beta", "logsnr")}


def geometric(problem, table, trajectory):
    return float((errors(problem, table, trajectory) + 1e-12).log().mean().exp())


def bent(schedule, n=4, seed=0):
    """A sampler that is none of ours: nodes, times and weights moved a little from those of a solver."""
    rng = np.random.default_rng(seed)
    learned = Learned.of(
        schedule, tabulate(schedule, time_grid(schedule, n, SPACINGS[schedule.path][0]), SOLVERS["dpmpp_2m"])
    )
    with torch.no_grad():
        learned.spread += torch.from_numpy(rng.normal(0, 0.3, n))
        learned.spread[-1].clamp_(min=-1)  # away from the least noise
        told = rng.normal(0, 0.05, n)
        told[0], told[-1] = abs(told[0]), -abs(told[-1])  # inside of what was trained on
        learned.told += torch.from_numpy(told)
        learned.weights += torch.from_numpy(rng.normal(0, 0.03, len(learned.weights)))
    return learned.table()


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("solver", ["ddim", "er_ode_1_corrected", "unipc"])
def test_tables_come_back(solver, path):
    """Whatever solver the weights are told apart from; nodes stay 0.01 apart, and so far from the least noise."""
    schedule = SCHEDULES[path]
    tables = [tabulate(schedule, time_grid(schedule, 5, spacing), SOLVERS["dpmpp_3m"]) for spacing in SPACINGS[path]]
    for table in (*tables, bent(schedule, 5)):
        back = Learned.of(schedule, table, SOLVERS[solver]).table()
        near = np.diff([*table.lambdas[:-1], schedule.lambda_min_noise]).min() < 0.01
        np.testing.assert_allclose(back.lambdas, table.lambdas, rtol=1e-9, atol=0.01 if near else 1e-9)
        np.testing.assert_allclose(back.timesteps, table.timesteps, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(back.rows, table.rows, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", SCHEDULES)
def test_a_placement_is_a_grid(path):
    schedule = SCHEDULES[path]
    table = bent(schedule)
    learned = Learned.of(schedule, table)
    grid = learned.placed(learned.placement())
    np.testing.assert_allclose(grid.lambdas, table.lambdas, rtol=1e-9)
    np.testing.assert_allclose(grid.timesteps, table.timesteps, rtol=1e-9)
    before = learned.placement().copy()
    moved = learned.placed(before + 0.1 * np.arange(8))
    assert moved.lambdas[0] == grid.lambdas[0]  # runs begin where the noise is
    assert moved.lambdas[1] != grid.lambdas[1]
    assert (learned.placement() == before).all()
    wild = learned.placed(20 * np.random.default_rng(0).standard_normal(8))
    assert (np.diff(wild.timesteps) <= 0).all()
    assert schedule.times[0] <= wild.timesteps[-1]
    assert wild.timesteps[0] <= schedule.times[-1]


@pytest.mark.parametrize("path", SCHEDULES)
def test_the_loss_is_that_of_the_table(path):
    problem = mixture(SCHEDULES[path], 4, hears=0.3)
    trajectory = reference(problem, 40, **QUIET)
    table = bent(problem.schedule)
    learned = Learned.of(problem.schedule, table, SOLVERS["er_ode_1_corrected"])
    wanted = float((errors(problem, table, trajectory) + 1e-6).log().mean())
    assert float(learned.loss(problem, trajectory.end, 1e-6).detach()) == pytest.approx(wanted, rel=1e-4)


def gradients(learned, problem, trajectory, name):
    """Of the loss in one of the learned tensors, and what differences say."""
    learned.loss(problem, trajectory.end, 1e-6).backward()
    values, size, found = getattr(learned, name), 1e-3, []
    for i in range(len(values)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                values[i] += sign * size
                ends.append(float(learned.loss(problem, trajectory.end, 1e-6)))
                values[i] -= sign * size
        found.append((ends[0] - ends[1]) / (2 * size))
    return values.grad.numpy(), np.array(found)


@pytest.mark.parametrize("name", ["spread", "told", "weights"])
@pytest.mark.parametrize("solver", ["ddim", "er_ode_1_corrected", "unipc"])
@pytest.mark.parametrize("path", SCHEDULES)
def test_gradients_are_differences(path, solver, name):
    """The weights of the solver move along with the nodes."""
    problem = mixture(SCHEDULES[path], 4, hears=0.3)
    trajectory = reference(problem, 40, **QUIET)
    table = bent(problem.schedule)
    own = tabulate(problem.schedule, table.grid, SOLVERS[solver])
    learned = Learned.of(problem.schedule, own, SOLVERS[solver])
    gradient, found = gradients(learned, problem, trajectory, name)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient, found, rtol=0.02, atol=0.01 * np.abs(found).max())


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_gradients_of_nodes_hold_for_any_weights(path):
    problem = mixture(SCHEDULES[path], 4, hears=0.3)
    trajectory = reference(problem, 40, **QUIET)
    learned = Learned.of(problem.schedule, bent(problem.schedule), SOLVERS["ddim"])
    gradient, found = gradients(learned, problem, trajectory, "spread")
    np.testing.assert_allclose(gradient, found, rtol=0.02, atol=0.01 * np.abs(found).max())


def planted(path, pairs=16):
    """A problem, its trajectory with the end that a sampler of four calls makes, and that sampler."""
    problem = mixture(SCHEDULES[path], pairs, hears=0.3)
    table = bent(problem.schedule)
    true = reference(problem, 60, **QUIET)
    x0 = torch.cat([true.x0[:-1], rollout(problem, table)[None]])
    return problem, Trajectory(problem.schedule, true.lambdas, true.x, x0), table


def ours(problem, steps):
    """The best of the package's fixed samplers on a problem."""
    schedule = problem.schedule
    tables = [
        tabulate(schedule, time_grid(schedule, steps, spacing), SOLVERS[name])
        for spacing in SPACINGS[schedule.path]
        for name in ("er_ode_1_corrected", "unipc", "dpmpp_2m", "ddim")
    ]
    return lambda trajectory: min(geometric(problem, table, trajectory) for table in tables)


@pytest.mark.parametrize("path", SCHEDULES)
def test_finds_a_planted_sampler(path):
    """Its error is 0: what is found must come near, on the pairs and beside them, where fixed samplers do not."""
    problem, trajectory, table = planted(path, 32)
    assert geometric(problem, table, trajectory) < 1e-11
    fit, held = slice(0, 24), slice(24, 32)
    found = auto(problem.part(fit), trajectory.part(fit), 4, iterations=100, rate=0.05, **QUIET)
    fixed = ours(problem.part(held), 4)(trajectory.part(held))
    assert geometric(problem.part(held), found.table, trajectory.part(held)) < 0.15 * fixed


@pytest.mark.parametrize("path", SCHEDULES)
def test_beats_random_samplers_at_equal_calls(path):
    """As many random grids, with the best of the solvers on them, as the search made runs."""
    problem = mixture(SCHEDULES[path], 16, hears=0.3)
    trajectory = reference(problem, 60, **QUIET)
    problem.spent = 0
    found = auto(problem, trajectory, 4, rounds=4, iterations=20, **QUIET)
    runs, rng, schedule = problem.spent // (4 * len(problem)), np.random.default_rng(0), problem.schedule
    first = time_grid(schedule, 4, SPACINGS[path][0]).lambdas[0]
    tried = []
    for _ in range(runs):
        inner = np.sort(rng.uniform(max(first, -7), schedule.lambda_min_noise, 3))
        grid = grid_of(schedule, [first, *inner])
        tried.append(geometric(problem, tabulate(schedule, grid, SOLVERS["er_ode_1_corrected"]), trajectory))
    assert geometric(problem, found.table, trajectory) < min(tried)


def test_each_stage_can_be_left_out():
    problem = mixture(SCHEDULES["vp"], 8)
    trajectory = reference(problem, 30, **QUIET)
    stages = {}
    for rounds, iterations in ((0, 0), (2, 0), (0, 12), (2, 12)):
        found = auto(problem, trajectory, 3, rounds=rounds, iterations=iterations, **QUIET)
        stages[rounds, iterations] = [line[0] for line in found.notes["history"]]
        assert isinstance(found.table, Table)
        assert found.table.steps == 3
    assert stages[0, 0] == ["least squares"]
    assert stages[2, 0] == ["least squares", "evolution"]
    assert stages[0, 12] == ["least squares", "descent", "descent"]
    assert stages[2, 12] == ["least squares", "evolution", "descent", "descent"]


def test_later_stages_are_never_worse_on_what_is_kept_aside():
    """Each is chosen by the pairs that it was not fitted on: every second one."""
    problem = mixture(SCHEDULES["vp"], 16)
    trajectory = reference(problem, 30, **QUIET)
    aside = torch.arange(16) % 2 == 1
    last = np.inf
    for rounds, iterations in ((0, 0), (3, 0), (3, 20)):
        found = auto(problem, trajectory, 3, rounds=rounds, iterations=iterations, **QUIET)
        error = geometric(problem.part(aside), found.table, trajectory.part(aside))
        assert error <= last * (1 + 1e-6)
        last = error


def test_the_same_seed_finds_the_same():
    problem = mixture(SCHEDULES["flow"], 8)
    trajectory = reference(problem, 30, **QUIET)
    one, two, three = (
        auto(problem, trajectory, 3, rounds=1, iterations=3, batch=2, seed=seed, **QUIET).table for seed in (0, 0, 1)
    )
    assert one.rows == two.rows
    assert one.rows != three.rows


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(steps):
    problem = mixture(SCHEDULES["vp"], 8)
    trajectory = reference(problem, 30, **QUIET)
    found = auto(problem, trajectory, steps, rounds=1, iterations=3, **QUIET)
    plain = tabulate(problem.schedule, time_grid(problem.schedule, steps, "beta"), SOLVERS["ddim"])
    assert geometric(problem, found.table, trajectory) <= geometric(problem, plain, trajectory)
