"""Align Your Steps: KLUB and its optima for Gaussian data, where all is known; the search, its resumption."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.exponential_runge_kutta import ExponentialRungeKutta
from diffaccel.samplers.schedule import NoiseSchedule, betas, zero_terminal_snr
from diffaccel.samplers.search.ays import Journal, Search, ays, halved, interpolated, ladder, start_levels
from diffaccel.samplers.search.klub import Klub, gaps, refined
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import reference
from diffaccel.samplers.search.rollout import errors

SCALED_LINEAR = np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000))
SCHEDULES = {
    "vp": NoiseSchedule.from_alphas_cumprod(SCALED_LINEAR),
    "ve": NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 1000), "ve"),
    "flow": NoiseSchedule.rectified_flow(1000),
}
EULER, STD = ExponentialAdams(order=1), 0.5


def gaussian(schedule, size, pairs=8, std=STD):
    """Isotropic Gaussian data."""

    def x0(x, lam, time, rows):
        alpha, sigma = np.array([schedule.alpha_sigma(float(one)) for one in lam]).T
        gain = std**2 * alpha / (std**2 * alpha**2 + sigma**2)
        return x * torch.from_numpy(gain).to(x)[:, None]

    top = schedule.lambda_at(schedule.times[-1] - (schedule.path == "flow"))
    alpha, sigma = schedule.alpha_sigma(float(top))
    scale = math.sqrt(alpha**2 * std**2 + sigma**2)
    noise = scale * torch.randn(pairs, size, generator=torch.Generator().manual_seed(0))
    return Problem(schedule, x0, noise, batch=10**6)


def estimated(schedule, levels, samples=64, size=512, seed=1):
    """KLUB of Gaussian data at `levels`, by samples."""
    generator = torch.Generator().manual_seed(seed)
    clean = STD * torch.randn(samples, size, generator=generator)
    found = gaps(gaussian(schedule, size), clean, torch.arange(samples) % 8, levels, generator)
    return refined(Klub(levels, found), 4)


def mixture(schedule, means):
    """Data of equally likely points with a std of 0.1."""

    def x0(x, lam, time, rows):
        alpha = np.array([schedule.alpha_sigma(float(one))[0] for one in lam])
        y, s2 = x.double() / torch.from_numpy(alpha)[:, None], torch.exp(-2 * lam)[:, None]
        weights = torch.softmax((y @ means.double().T - means.double().square().sum(1) / 2) / (s2 + 0.01), dim=1)
        return ((0.01 * y + s2 * (weights @ means.double())) / (s2 + 0.01)).float()

    return Problem(
        schedule, x0, torch.randn(4, means.shape[1], generator=torch.Generator().manual_seed(0)), batch=10**6
    )


def exact(levels):
    """KLUB of increasing levels for Gaussian data, with the antiderivative of corrections.md, A4."""

    def antiderivative(t, b):
        inverse = 1 / (b * b + STD**2)
        return -1 / (2 * STD**2 * t * t) + math.log1p(STD**2 / t**2) / (2 * STD**4) + inverse / (2 * t * t)

    pairs = itertools.pairwise(levels)
    return STD**4 * sum(antiderivative(b, b) - antiderivative(a, b) for a, b in pairs)


def optimum(top, end, intervals):
    """Falling levels with the least exact KLUB."""

    def levels(z):
        share = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        return end * np.exp(np.append(0, np.cumsum(share)) * math.log(top / end))

    found = minimize(lambda z: math.log(exact(levels(z))), np.zeros(intervals), method="BFGS", options={"gtol": 1e-9})
    return levels(found.x)[-2:0:-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_klub_is_that_of_the_closed_form(name):
    klub = estimated(SCHEDULES[name], np.geomspace(0.01, 50, 64))
    levels = [0.01, 0.1, 0.7, 3.0, 50.0]
    assert klub.of_schedule(levels[::-1]) == pytest.approx(exact(levels), rel=0.02)
    middles = np.geomspace(0.12, 2.5, 7)
    found = [klub.of_schedule([3.0, middle, 0.1]) for middle in middles]
    wanted = [exact([0.1, middle, 3.0]) for middle in middles]
    np.testing.assert_allclose(found, wanted, rtol=0.02)
    assert max(wanted) > 1.5 * min(wanted)  # the paper's estimator, as printed, would find them all the same


def test_klub_is_that_of_the_papers_importance_sampling():
    """A mixture, whose KLUB has no closed form; the paper's density with its normalisation (corrections.md, A4)."""
    schedule, generator = SCHEDULES["vp"], torch.Generator().manual_seed(5)
    means, n, c = torch.randn(4, 16, generator=generator), 20000, 0.7
    problem = mixture(schedule, means)
    clean = means[torch.randint(4, (n,), generator=generator)] + 0.1 * torch.randn(n, 16, generator=generator)
    low, high = 0.2, 2.0

    def weight(t):
        return 1 / (t**2 + c**2) - 1 / (high**2 + c**2)

    knots = np.geomspace(low, high, 4001)
    density = weight(knots) / knots**3
    mass = np.append(0, np.cumsum(np.diff(knots) * (density[1:] + density[:-1]) / 2))
    t = torch.from_numpy(np.interp((np.arange(n) + 0.5) / n * mass[-1], mass, knots))
    y = clean + t[:, None] * torch.randn(n, 16, generator=generator)
    more = y + (high**2 - t**2).sqrt()[:, None] * torch.randn(n, 16, generator=generator)
    at_high = torch.full((n,), high, dtype=torch.float64)

    def predicted(y, sigma):
        alpha = torch.tensor([schedule.alpha_sigma(-math.log(v))[0] for v in sigma.tolist()])
        return problem.denoise((y * alpha[:, None]).float(), -sigma.log(), rows=torch.zeros(n, dtype=torch.long))

    gap = (predicted(y, t) - predicted(more, at_high)).double().square().mean(1)
    wanted = mass[-1] * float((gap / weight(t)).mean())
    levels = np.geomspace(0.05, 10, 48)
    found = Klub(levels, gaps(problem, clean[:2000], torch.zeros(2000, dtype=torch.long), levels, generator))
    found = refined(found, 4)
    assert found.of_interval(low, high) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("low", "high", "best"), [(0.1, 0.5, 0.2006253), (1, 80, 1.4552121), (0.02, 3, 0.1012945)])
def test_middle_of_two_levels_is_the_closed_form(low, high, best):
    a, b, c = low, high, STD
    assert best == pytest.approx(
        c * math.sqrt(a * b / (math.sqrt((a * a + c * c) * (b * b + c * c)) - a * b)), rel=1e-6
    )
    klub = estimated(SCHEDULES["ve"], np.geomspace(low, high, 64))
    search = Search(klub, lambda sigmas: 0.0, Journal(None, [], []), 11, [])
    sigmas = np.array([high, math.sqrt(low * high), low])
    for _ in range(20):
        sigmas = search.passed(sigmas, [1])
    assert sigmas[1] == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize(("name", "steps"), [("vp", 4), ("ve", 4), ("flow", 4), ("vp", 8)])
def test_all_levels_of_a_schedule_are_those_of_a_minimiser(name, steps):
    """From exact gaps between 64 levels: what is left is the interpolation, and the search."""
    schedule = SCHEDULES[name]
    top = math.exp(-float(schedule.lambda_at(schedule.times[-1] - (name == "flow"))))
    levels = np.geomspace(math.exp(-schedule.lambda_min_noise), top, 64)
    inverse = 1 / (levels**2 + STD**2)
    klub = refined(Klub(levels, STD**4 * np.abs(inverse[:, None] - inverse)), 4)
    search = Search(klub, lambda sigmas: 0.0, Journal(None, [], []), 11, [])
    sigmas = start_levels(schedule, top, levels[0], steps)
    for _ in range(60):
        before, sigmas = sigmas, search.passed(sigmas, range(1, steps))
        if np.abs(sigmas / before - 1).max() < 1e-3:
            break
    np.testing.assert_allclose(sigmas[1:-1], optimum(top, levels[0], steps), rtol=0.02)
    assert klub.of_schedule(sigmas) == pytest.approx(exact(sigmas[::-1]), rel=1e-3)


def test_beats_random_search_at_equal_calls():
    """Random schedules, judged by the paper's own two calls a sample of one interval after the other."""
    schedule = SCHEDULES["vp"]
    problem = gaussian(schedule, 256)
    trajectory = reference(problem, 20, progress=False)
    clean = STD * torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    problem.spent = 0
    found = ays(problem, trajectory, 6, solver=EULER, data=clean, samples=64, passes=12, progress=False)
    last = found.notes["history"][-1]["sigmas"]
    tries = problem.spent // (2 * 64)
    generator = np.random.default_rng(0)
    ends = np.log([last[-1], last[0]])
    draws = [np.exp([ends[0], *np.sort(generator.uniform(*ends, 5)), ends[1]]) for _ in range(tries)]
    assert tries > 30
    assert exact(last[::-1]) < min(exact(levels) for levels in draws)  # and they are judged without noise


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_best_pass_by_error_is_returned(name):
    problem = gaussian(SCHEDULES[name], 64)
    trajectory = reference(problem, 20, progress=False)
    solver = ExponentialAdams(order=2)
    found = ays(problem, trajectory, 6, solver=solver, samples=16, passes=8, progress=False)
    history = found.notes["history"]
    each = [one["error"] for one in history]
    assert found.notes["chosen"] == int(np.argmin(each))
    assert float(errors(problem, found.table, trajectory).log().mean().exp()) == pytest.approx(min(each), rel=1e-9)
    assert history[1]["klub"] < history[0]["klub"]
    assert found.table.lambdas[0] == trajectory.lambdas[0]
    assert math.isinf(found.table.lambdas[-1])
    assert found.table.steps == 6


def test_rungs_halve_and_only_new_levels_move():
    problem = gaussian(SCHEDULES["vp"], 64)
    trajectory = reference(problem, 20, progress=False)
    found = ays(problem, trajectory, 16, solver=EULER, samples=16, passes=3, progress=False)
    tens = [one for one in found.notes["history"] if one["intervals"] == 10]
    twenties = [np.array(one["sigmas"]) for one in found.notes["history"] if one["intervals"] == 20]
    best = np.array(min(tens, key=lambda one: one["error"])["sigmas"])
    for sigmas in twenties:
        np.testing.assert_allclose(sigmas[::2], best, rtol=1e-12)
    np.testing.assert_allclose(twenties[0][1::2], np.sqrt(best[1:] * best[:-1]), rtol=1e-12)
    assert np.abs(twenties[1][1::2] / twenties[0][1::2] - 1).min() > 1e-4
    assert found.table.steps == 16  # interpolated


def test_ladder_and_interpolation():
    assert [ladder(n)[-1] for n in (1, 5, 10, 14, 15, 20, 28, 29, 40, 100)] == [1, 5, 10, 10, 20, 20, 20, 40, 40, 40]
    assert ladder(40) == (10, 20, 40)
    levels = np.array([8.0, 2.0, 0.5, 0.25])
    np.testing.assert_allclose(interpolated(levels, 6), [8, 4, 2, 1, 0.5, 0.125**0.5, 0.25], rtol=1e-12)
    np.testing.assert_allclose(halved(levels), interpolated(levels, 6), rtol=1e-12)


class DiedError(Exception):
    pass


def same(one, other):
    return (one.table.lambdas, one.table.rows, one.notes) == (other.table.lambdas, other.table.rows, other.notes)


@pytest.mark.parametrize("calls", [2, 5, 9, 20])
def test_an_interrupted_search_goes_on(calls, tmp_path):
    """In the middle of the samples, and of the passes."""
    problem = gaussian(SCHEDULES["vp"], 16)
    trajectory = reference(problem, 10, progress=False)
    settings = {"solver": EULER, "samples": 40, "levels": 16, "passes": 4, "progress": False}
    problem.spent = 0
    whole = ays(problem, trajectory, 4, **settings)
    spent, left, network = problem.spent, [calls], problem.function

    def dying(*args):
        left[0] -= 1
        if left[0] < 0:
            raise DiedError
        return network(*args)

    problem.function, problem.spent = dying, 0
    with pytest.raises(DiedError):
        ays(problem, trajectory, 4, cache=tmp_path, **settings)
    before, problem.function = problem.spent, network
    again = ays(problem, trajectory, 4, cache=tmp_path, **settings)
    assert problem.spent - before < spent
    assert same(again, whole)
    problem.spent = 0
    assert same(ays(problem, trajectory, 4, cache=tmp_path, **settings), whole)
    assert problem.spent == 0
    assert len(list(tmp_path.iterdir())) == 1
    ays(problem, trajectory, 4, cache=tmp_path, **settings | {"seed": 1})
    assert problem.spent > 0


def test_pure_noise_starts_where_the_trajectory_does():
    """Zero-terminal-SNR models, above where KLUB's levels begin."""
    schedule = NoiseSchedule.from_alphas_cumprod(zero_terminal_snr(SCALED_LINEAR))
    problem = gaussian(schedule, 16)
    trajectory = reference(problem, 20, progress=False)
    found = ays(problem, trajectory, 5, solver=EULER, samples=8, passes=2, progress=False)
    assert found.table.lambdas[0] == trajectory.lambdas[0] == schedule.lambdas[-1]
    assert np.isfinite([one["klub"] for one in found.notes["history"]]).all()


def test_bad_input_gets_a_sentence():
    problem = gaussian(SCHEDULES["vp"], 4)
    trajectory = reference(problem, 5, progress=False)
    with pytest.raises(ValueError, match="steps must be between 1 and the 1000"):
        ays(problem, trajectory, 0, solver=EULER, progress=False)
    with pytest.raises(ValueError, match="candidates must be an odd number"):
        ays(problem, trajectory, 5, solver=EULER, candidates=10, progress=False)
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        ays(problem, trajectory, 5, solver=EULER, samples=0, progress=False)
    problem.spent = 0
    with pytest.raises(ValueError, match="multistep solvers"):
        ays(problem, trajectory, 5, solver=ExponentialRungeKutta(), progress=False)
    assert problem.spent == 0
