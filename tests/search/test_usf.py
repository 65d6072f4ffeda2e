"""USF: mixed steps agree with the solvers they are made of, and the search finds planted optima."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from diffaccel.samplers.adams_bashforth import AdamsBashforth
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.schedule import NoiseSchedule, betas
from diffaccel.samplers.search.genome import ESTIMATES, Decision, Genome, compose
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import reference
from diffaccel.samplers.search.rollout import errors
from diffaccel.samplers.search.surrogate import Surrogate, rank_correlation
from diffaccel.samplers.search.usf import Decisions, starting_genomes, usf
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import tabulate

SCHEDULES = {
    "vp": NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000))),
    "ve": NoiseSchedule.from_sigmas(np.geomspace(0.02, 80, 1000), "ve"),
    "flow": NoiseSchedule.rectified_flow(1000),
}
UNIFORM = {
    "ddim": Decision(1),
    "dpmpp_2m": Decision(2),
    "dpmpp_3m": Decision(3),
    "res_2m": Decision(2, estimate="exact"),
    "dpm_2m": Decision(2, "epsilon"),
    "dpm_3m": Decision(3, "epsilon"),
    "unipc_1": Decision(1, corrector=True),
    "unipc": Decision(2, corrector=True),
    "unipc_3_bh1": Decision(3, estimate="bh1", corrector=True),
    "unipc_1_bh1_eps": Decision(1, "epsilon", "bh1", True),
    "er_ode_1_corrected": Decision(1, "x0", "sigma", True),
    "er_ode_3": Decision(3, "x0", "sigma"),
    "deis_rhoab1": Decision(2, "epsilon", "sigma"),
    "deis_rhoab2": Decision(3, "epsilon", "sigma"),
}


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_decisions_are_the_named_solver(name, final, path):
    schedule = SCHEDULES[path]
    grid = time_grid(schedule, 6, "logsnr", final=final)
    solver = replace(SOLVERS[name], lower_final=0)
    expected = tabulate(schedule, grid, solver)
    found = compose(schedule, grid, [UNIFORM[name]] * 6)
    for row, wanted in zip(found.rows, expected.rows, strict=True):
        np.testing.assert_allclose(row, wanted, rtol=1e-10, atol=1e-10 * max(map(abs, wanted)))


def test_adams_moulton():
    schedule = SCHEDULES["vp"]
    grid = time_grid(schedule, 5, "karras")
    expected = tabulate(schedule, grid, AdamsBashforth(2, corrector=True))
    found = compose(schedule, grid, [Decision(2, "epsilon", "sigma", True)] * 5)
    for row, wanted in zip(found.rows, expected.rows, strict=True):
        np.testing.assert_allclose(row, wanted, rtol=1e-10, atol=1e-10)


def test_orders_fall_at_the_end_as_dpmpp_3m_has_it():
    schedule = SCHEDULES["vp"]
    grid = time_grid(schedule, 5, "karras")
    expected = tabulate(schedule, grid, SOLVERS["dpmpp_3m"])  # lower_final is 15
    found = compose(schedule, grid, [Decision(order) for order in (3, 3, 3, 2, 1)])
    for row, wanted in zip(found.rows, expected.rows, strict=True):
        np.testing.assert_allclose(row, wanted, rtol=1e-10, atol=1e-10)


def test_a_mixed_run_by_hand():
    """DDIM corrected in eps (bh1), then DPM-Solver++(2M), then the x0 that belongs to the last eps: written out."""
    schedule = SCHEDULES["vp"]
    lam = np.array([-2.0, -0.7, 0.9])
    s, (h, k) = np.exp(-lam), np.diff(lam)
    y0, (a, b, c) = 1.3, (0.2, -0.5, 0.7)
    eps_a = (y0 - a) / s[0]
    y1 = y0 + (s[1] - s[0]) * eps_a
    eps_b = (y1 - b) / s[1]
    corrected = y0 - s[1] * math.expm1(h) * eps_a - s[1] * h / 2 * (eps_b - eps_a)  # B(h) = h
    y2 = s[2] / s[1] * corrected - math.expm1(-k) * (b + k / h / 2 * (b - a))
    u = np.array([k, 0.0, -h])
    moments = [-math.expm1(-k), k + math.expm1(-k), k**2 - 2 * (k + math.expm1(-k))]
    # exact weights of the parabola through c, b and a in x0
    w = np.linalg.solve(np.vander(u, increasing=True).T, moments)
    redone = s[2] / s[1] * corrected + w @ [c, b, a]
    y3 = redone - s[2] * (y2 - c) / s[2]
    decisions = [Decision(1, "epsilon", "bh1", True), Decision(2, corrector=True), Decision(1, "epsilon")]
    table = Genome(tuple(lam), tuple(decisions)).table(schedule)
    y, known = y0, []
    for row, x0, wanted in zip(table.rows, (a, b, c), (y1, y2, y3), strict=True):
        known.insert(0, x0)
        y = row[0] * y + np.dot(row[1:], known)
        assert y == pytest.approx(wanted, rel=1e-12)


STDS = torch.tensor([0.05, 0.3, 1.0, 2.0])


def gaussian(count=16, schedule=SCHEDULES["vp"], seed=0):
    """Data of four independent numbers."""

    def x0(x, lam, time, rows):
        alpha, sigma = (
            torch.tensor(v).float()[:, None] for v in zip(*map(schedule.alpha_sigma, lam.tolist()), strict=True)
        )
        return STDS**2 * alpha * x / (STDS**2 * alpha**2 + sigma**2)

    scale = schedule.alpha_sigma(float(schedule.lambdas[-1]))[1]
    noise = scale * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    problem = Problem(schedule, x0, noise)
    trajectory = reference(problem, 100, progress=False)
    problem.spent = 0
    return problem, trajectory


def test_finds_the_planted_optimum():
    """Two calls: every pair of decisions, each with the best node, against the search."""
    problem, trajectory = gaussian(6)  # below 8: all pairs select
    space, rows = Decisions(problem, trajectory), range(6)
    start, least = float(problem.schedule.lambdas[-1]), problem.schedule.lambda_min_noise
    decisions = [Decision(*d) for d in itertools.product((1, 2), ("x0", "epsilon"), ESTIMATES, (False, True))]
    firsts = [d for d in decisions if d.order == 1]
    genomes = [
        Genome((start, 0.0), both, end) for both in itertools.product(firsts, decisions) for end in (math.inf, least)
    ]
    best = math.inf
    for genome in {space.key(g): g for g in genomes}.values():

        def error(node, genome=genome):
            return float(space.score(replace(genome, lambdas=(start, float(node))), rows).mean())

        grid = np.linspace(start + 0.5, least - 0.5, 9)
        values = [error(node) for node in grid]
        i = int(np.argmin(values))
        if values[i] < 3 * best:
            ends = grid[max(i - 1, 0)], grid[min(i + 1, 8)]
            best = min(best, minimize_scalar(error, ends, method="bounded", bounds=ends, options={"xatol": 1e-3}).fun)
    found = usf(problem, trajectory, 2, evaluations=150, progress=False)
    assert float(errors(problem, found.table, trajectory).mean()) <= 1.02 * best


@pytest.mark.parametrize("path", SCHEDULES)
def test_beats_random_search_and_the_best_known_sampler(path):
    schedule = SCHEDULES[path]
    problem, trajectory = gaussian(6, schedule)
    found = usf(problem, trajectory, 4, evaluations=150, progress=False)
    spent, problem.spent = problem.spent, 0
    assert spent <= 150 * 6 * 4 + 6 * 10
    best = float(errors(problem, found.table, trajectory).mean())
    rng, space = np.random.default_rng(0), Decisions(problem, trajectory)
    random = [float(space.score(g, range(6)).mean()) for g in starting_genomes(schedule, 4).values()]
    known, problem.spent = min(random), 0
    least, start = schedule.lambda_min_noise, trajectory.lambdas[0]
    while problem.spent < spent:
        nodes = (start, *np.sort(rng.uniform(start, least, 3)))
        drawn = tuple(
            Decision(int(rng.integers(1, 4)), "x0", ESTIMATES[rng.integers(4)], bool(rng.integers(2))) for _ in nodes
        )
        random.append(float(space.score(Genome(tuple(map(float, nodes)), drawn), range(6)).mean()))
    assert best < 0.85 * min(random)
    assert best < 0.8 * known
    assert found.notes["selected_on"]["start"]["mean"] == pytest.approx(known)
    assert found.notes["improved"]


def test_notes_are_json_and_honest():
    problem, trajectory = gaussian(12)
    found = usf(problem, trajectory, 3, evaluations=40, progress=False)
    notes = json.loads(json.dumps(found.notes))
    assert Genome.from_json(notes["genome"]).table(problem.schedule).rows == found.table.rows
    assert notes["held_out"]["found"]["pairs"] == 3
    assert notes["selected_on"]["found"]["pairs"] == 9
    assert notes["selected_on"]["found"]["standard_error"] > 0
    assert notes["evaluations"] <= 40
    assert [b for _, b in notes["history"]] == sorted((b for _, b in notes["history"]), reverse=True)
    assert notes["start"] in starting_genomes(problem.schedule, 3)


class StoppedError(Exception):
    pass


def test_an_interrupted_search_goes_on(tmp_path):
    problem, trajectory = gaussian(8)
    whole = usf(problem, trajectory, 3, evaluations=40, progress=False)
    plain, limit = problem.function, problem.spent / 2
    problem.spent = 0

    def failing(*args):
        if problem.spent > limit:
            raise StoppedError
        return plain(*args)

    problem.function = failing
    with pytest.raises(StoppedError):
        usf(problem, trajectory, 3, evaluations=40, cache=tmp_path, progress=False)
    problem.function, problem.spent = plain, 0
    again = usf(problem, trajectory, 3, evaluations=40, cache=tmp_path, progress=False)
    assert again.table.rows == whole.table.rows
    assert again.notes["evaluations"] == whole.notes["evaluations"]
    assert again.notes["evaluations_now"] < 0.7 * whole.notes["evaluations"]
    assert problem.spent < 1.4 * limit


def test_the_winner_must_hold_on_pairs_it_was_not_selected_on():
    problem, trajectory = gaussian(8)
    plain = Decisions.score
    held = set(np.random.default_rng(0).permutation(8)[:2].tolist())

    def score(self, genome, rows):
        known = genome in starting_genomes(problem.schedule, 3).values()
        found = plain(self, genome, rows)
        return found + (10.0 if set(rows) <= held and not known else 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decisions, "score", score)
        found = usf(problem, trajectory, 3, evaluations=70, progress=False)
    assert found.notes["held_out"]["difference"]["mean"] > 5
    assert not found.notes["improved"]
    assert found.table.rows == starting_genomes(problem.schedule, 3)[found.notes["start"]].table(problem.schedule).rows


def test_one_call_has_nothing_to_decide():
    problem, trajectory = gaussian(4)
    found = usf(problem, trajectory, 1, evaluations=200, progress=False)
    assert found.table.steps == 1
    with pytest.raises(ValueError, match="do not suffice"):
        usf(problem, trajectory, 3, evaluations=1, progress=False)


def test_a_run_that_blows_up_does_not_win():
    problem, trajectory = gaussian(6)
    plain = problem.function
    problem.function = lambda x, lam, time, rows: torch.where(lam[:, None] > 3, torch.nan, plain(x, lam, time, rows))
    found = usf(problem, trajectory, 3, evaluations=40, progress=False)
    assert float(errors(problem, found.table, trajectory).mean()) < 1


def test_surrogate_ranks_a_smooth_function():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    y = np.sin(x[:, 0]) + x[:, 1] ** 2 + 0.01 * rng.normal(size=400)
    guess = Surrogate.fit(x[:200], y[:200])(x[200:])
    assert rank_correlation(guess, y[200:]) > 0.9
    assert rank_correlation(y, -y) == pytest.approx(-1)
    assert rank_correlation(y, np.ones(400)) == 0
