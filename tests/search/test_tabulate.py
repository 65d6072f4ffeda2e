"""Tables: every deterministic solver, unrolled, makes the samples of its own scheduler; schedulers run tables."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffaccel import RecipeScheduler, SolverScheduler
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.non_stationary import NonStationary
from diffaccel.samplers.plan import Layout, is_singlestep
from diffaccel.samplers.search.recipe import Entry, Recipe, schedule_facts
from diffaccel.samplers.search.rollout import rollout, run
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import Table, grid_of, tabulate, unrolled
from tests.search.problems import SCHEDULES, mixture

CONFIGS = {
    "vp": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "ve": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
    "flow": {"prediction_type": "flow_prediction"},
}
SPACINGS = {"vp": ("logsnr", "trailing", "leading"), "ve": ("karras", "beta"), "flow": ("flow", "beta", "logsnr")}
ODE = [name for name, solver in SOLVERS.items() if not solver.stochastic]
MULTISTEP = [name for name in ODE if not is_singlestep(SOLVERS[name])]
REDOES = [name for name in MULTISTEP if SOLVERS[name].can_correct]


def scheduler_for(path, name="ddim", final="zero", **options):
    return SolverScheduler(**CONFIGS[path], final_sigmas_type=final, solver_options={"solver": name, **options})


def stepped(scheduler, problem):
    """The scheduler's own run in float64: its loop, its steps, its coefficients before they are rounded."""
    scheduler._table = torch.from_numpy(scheduler._rows)
    x = problem.noise
    for i, t in enumerate(scheduler.timesteps):
        lam = scheduler.grid.lambdas[i]
        p, q = scheduler._x0_of(lam)  # the network's output is what gives this x0
        x0 = problem.denoise(x, lam, float(scheduler.grid.timesteps[i]))
        x = scheduler.step((x0 - p * x) / q, t, x, return_dict=False)[0]
    return x


def close(a, b, limit=1e-9):
    return float((a - b).norm() / b.norm()) < limit


@pytest.mark.parametrize("path", CONFIGS)
@pytest.mark.parametrize("name", ODE)
def test_every_solver_is_its_table(name, path):
    problem = mixture(SCHEDULES[path], 3)
    for spacing in SPACINGS[path]:
        for final in ("zero", "sigma_min"):
            scheduler = scheduler_for(path, name, final, schedule=spacing)
            scheduler.set_timesteps(7)
            table = tabulate(scheduler.schedule, scheduler.grid, SOLVERS[name])
            assert table.steps == 7
            assert [len(row) for row in table.rows] == list(range(2, 9))
            assert close(rollout(problem, table), stepped(scheduler, problem)), (spacing, final)


@pytest.mark.parametrize("path", CONFIGS)
@pytest.mark.parametrize("name", REDOES)
def test_starts_and_ends_that_redo_a_step(name, path):
    """Order 4 with a singlestep start calls twice at its second node, `corrector` twice at its end."""
    problem = mixture(SCHEDULES[path], 3)
    for final, start in (("zero", "singlestep"), ("corrector", "euler"), ("corrector", "singlestep")):
        scheduler = scheduler_for(path, name, final, start=start, schedule=SPACINGS[path][0])
        scheduler.set_timesteps(7)
        table = tabulate(scheduler.schedule, scheduler.grid, SOLVERS[name], start=start)
        assert close(rollout(problem, table), stepped(scheduler, problem)), (final, start)


def test_a_start_of_order_four_calls_twice_at_its_second_node():
    """Or the test above has no such case."""
    solver = next(name for name in REDOES if SOLVERS[name].convergence_order > 3 and SOLVERS[name].memory == "x0")
    scheduler = scheduler_for("vp", solver, start="singlestep")
    scheduler.set_timesteps(7)
    assert scheduler.grid.lambdas[1] == scheduler.grid.lambdas[2]


@pytest.mark.parametrize("path", CONFIGS)
@pytest.mark.parametrize("name", ODE)
def test_schedulers_run_tables(name, path):
    """In float32, as pipelines do, from a recipe; solvers that call twice at a node too."""
    problem = mixture(SCHEDULES[path], 3)
    scheduler = scheduler_for(path, name, "zero", schedule=SPACINGS[path][0])
    scheduler.set_timesteps(6)
    table = tabulate(scheduler.schedule, scheduler.grid, SOLVERS[name])
    network = {"class": "Toy", "config": {}, **schedule_facts(scheduler)}
    recipe = Recipe(network, (Entry.of(table, "test", 1.0),))
    ours = recipe.scheduler(scheduler.config)
    assert isinstance(ours, RecipeScheduler)
    ours.set_timesteps(6)
    assert close(stepped(ours, problem), rollout(problem, table))


@pytest.mark.parametrize("path", CONFIGS)
def test_non_stationary_is_a_solver_like_others(path):
    """It runs in a plan by itself, and its table is what it was given."""
    schedule, rng = SCHEDULES[path], np.random.default_rng(0)
    rows = tuple(tuple(rng.normal(size=i + 2).tolist()) for i in range(5))
    grid = time_grid(schedule, 5, "logsnr")
    for found, given in zip(tabulate(schedule, grid, NonStationary(rows)).rows, rows, strict=True):
        np.testing.assert_allclose(found, given, rtol=1e-9)
    scheduler = scheduler_for(path)
    scheduler.solver = NonStationary(rows)
    scheduler._layout = Layout(5)
    scheduler._use(grid)
    problem = mixture(schedule, 3)
    assert close(stepped(scheduler, problem), rollout(problem, Table(grid, rows)))


@pytest.mark.parametrize("path", CONFIGS)
def test_ddim_by_hand(path):
    """y' = r y + (1 - r) x0 with r = exp(-h), and the last step is its x0."""
    schedule = SCHEDULES[path]
    grid = time_grid(schedule, 4, "logsnr")
    table = tabulate(schedule, grid, SOLVERS["ddim"])
    for i, h in enumerate(np.diff(grid.lambdas)):
        np.testing.assert_allclose(
            table.rows[i], [math.exp(-h), 1 - math.exp(-h), *[0.0] * i], rtol=1e-9, atol=1e-9 * table.rows[i][1]
        )
    assert table.rows[-1][:2] == (0.0, 1.0)


@pytest.mark.parametrize("path", CONFIGS)
def test_dpmpp_2m_by_hand(path):
    schedule = SCHEDULES[path]
    grid = time_grid(schedule, 6, "beta", final="sigma_min")
    table = tabulate(schedule, grid, replace(SOLVERS["dpmpp_2m"], lower_final=0))
    h = np.diff(grid.lambdas)
    for i in range(1, 6):
        d = (1 - math.exp(-h[i])) / (2 * h[i - 1] / h[i])  # of (m0 - m1) in the step: B(h) / 2 over r0
        wanted = [math.exp(-h[i]), 1 - math.exp(-h[i]) + d, -d, *[0.0] * (i - 1)]
        np.testing.assert_allclose(table.rows[i], wanted, rtol=1e-7, atol=1e-9)


def test_refining_replaces_the_newest_prediction_for_good():
    """The symbols of a run whose second prediction is halved are those of one where the network said half as much."""
    schedule = SCHEDULES["vp"]
    grid = time_grid(schedule, 5, "logsnr")
    plain = tabulate(schedule, grid, SOLVERS["dpmpp_3m"])
    halved = tabulate(schedule, grid, SOLVERS["dpmpp_3m"], refine=lambda i, times: [0.5] if i == 1 else None)
    for i, (a, b) in enumerate(zip(plain.rows, halved.rows, strict=True)):
        factor = np.ones(i + 2)
        if i >= 1:
            factor[1 + i - 1] = 0.5
        np.testing.assert_allclose(np.array(a) * factor, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("path", CONFIGS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_refining_what_is_kept_changes_the_x0_that_comes_of_it(final, path):
    """Solvers that keep eps: y + (s' - s) * eps with eps doubled from the second call on, and x0 = y - s * eps."""
    problem = mixture(SCHEDULES[path], 3)
    schedule, grid = problem.schedule, time_grid(SCHEDULES[path], 3, "beta", final=final)
    alphas = [schedule.alpha_sigma(lam)[0] for lam in grid.lambdas]
    sigmas = np.exp(-np.array(grid.lambdas))
    y = problem.noise / alphas[0]
    for i in range(3):
        x0 = problem.denoise(alphas[i] * y, grid.lambdas[i], float(grid.timesteps[i]))
        factor = 2 if i else 1
        y = (1 - factor) * y + factor * (x0 + sigmas[i + 1] / sigmas[i] * (y - x0))
    solver = replace(SOLVERS["ddim"], prediction="epsilon")
    table = tabulate(schedule, grid, solver, refine=lambda i, times: [2.0] if i else None)
    assert close(rollout(problem, table), alphas[-1] * y, 1e-6)


def test_refining_is_told_the_times_newest_first():
    schedule, heard = SCHEDULES["vp"], []
    grid = time_grid(schedule, 4, "logsnr")
    tabulate(schedule, grid, SOLVERS["dpmpp_2m"], refine=lambda i, times: heard.append((i, times.tolist())))
    assert heard == [(i, grid.timesteps[: i + 1][::-1].tolist()) for i in range(4)]


def test_what_corrections_see():
    """The samples before and after correction: UniPC's corrected sample at a node uses the prediction made there."""
    schedule = SCHEDULES["vp"]
    grid = time_grid(schedule, 4, "logsnr")
    states, corrected = unrolled(schedule, grid, SOLVERS["unipc"])
    assert len(states) == 5
    assert len(corrected) == 4
    for i in range(1, 4):
        assert states[i][1 + i] == 0
        assert corrected[i][1 + i] != 0
        assert not corrected[i][2 + i :].any()
    states, corrected = unrolled(schedule, grid, SOLVERS["dpmpp_2m"])
    assert all((a == b).all() for a, b in zip(states, corrected, strict=False))


def test_a_run_can_stop_and_count():
    problem = mixture(SCHEDULES["vp"], 4)
    table = tabulate(problem.schedule, time_grid(problem.schedule, 5, "logsnr"), SOLVERS["ddim"])
    whole, part = run(problem, table), run(problem, table, 2)
    assert problem.spent == 4 * 7
    assert [len(v) for v in whole] == [6, 5]
    assert [len(v) for v in part] == [3, 2]
    assert torch.equal(whole[0][2], part[0][2])


def test_the_network_is_told_what_the_table_says():
    schedule, told = SCHEDULES["vp"], [950.0, 400.5, 20.0]
    problem = mixture(schedule, 3, hears=0.5)
    grid = grid_of(schedule, [-2.0, 0.5, 2.0], timesteps=told)
    table = tabulate(schedule, grid, SOLVERS["ddim"])
    x = problem.noise
    for i in range(3):
        (a, s), (b, t) = (schedule.alpha_sigma(lam) for lam in grid.lambdas[i : i + 2])
        x0 = problem.denoise(x, grid.lambdas[i], told[i])
        x = b * x0 + t / s * (x - a * x0)
    assert close(rollout(problem, table), x)
    exact = tabulate(schedule, grid_of(schedule, [-2.0, 0.5, 2.0]), SOLVERS["ddim"])
    assert not close(rollout(problem, exact), x, 1e-3)


def test_grids_of_given_levels():
    schedule = SCHEDULES["vp"]
    grid = grid_of(schedule, [-2.0, 0.5])
    assert grid.lambdas == (-2.0, 0.5, math.inf)
    np.testing.assert_allclose(schedule.lambda_at(grid.timesteps), [-2.0, 0.5], rtol=1e-9)
    other = grid_of(schedule, np.array([-2.0, 0.5]), 2.0, [900, 300])
    assert other.lambdas[-1] == 2.0
    assert other.timesteps.tolist() == [900, 300]


@pytest.mark.parametrize("rows", [(), ((1.0,),), ((0.0, 1.0), (0.0, 1.0))])
def test_tables_of_another_shape_are_refused(rows):
    with pytest.raises(ValueError, match="row i of a table of weights"):
        NonStationary(rows)


def test_noise_is_refused():
    schedule = SCHEDULES["vp"]
    for name in ("ddpm", "dpmpp_2m_sde", "dpmpp_2s_ancestral"):
        with pytest.raises(ValueError, match="a solver with noise is no table"):
            tabulate(schedule, time_grid(schedule, 4, "logsnr"), SOLVERS[name])
