"""Runge-Kutta: order conditions in exact fractions, and whole runs against a naive loop over stages."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from diffaccel import SolverScheduler
from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.exponential_runge_kutta import ExponentialRungeKutta
from diffaccel.samplers.runge_kutta import TABLEAUS, RungeKutta
from diffaccel.samplers.solver import Singlestep
from tests.samplers.analytic import place
from tests.samplers.levels import SCHEDULES, nodes, of_ve_sigma

NAMES = {"euler": "euler_ancestral", "heun": "deis_rho2heun", "kutta3": "deis_rho3kutta"}
NAMES |= {"heun3": "deis_rho3heun", "rk4": "deis_rho4rk"}
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
EDM = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
Field = Callable[[np.ndarray, float], np.ndarray]


def exactly(values: tuple[float, ...]) -> list[Fraction]:
    out = [Fraction(v).limit_denominator(100) for v in values]
    assert [float(v) for v in out] == [float(v) for v in values]
    return out


@pytest.mark.parametrize("name", TABLEAUS)
def test_order_conditions_hold_in_fractions(name):
    """Butcher's, up to the declared order, which is also not understated."""
    tableau = TABLEAUS[name]
    c, b = exactly(tableau.c), exactly(tableau.b)
    s = len(c)
    a = [[*exactly(row), *[Fraction(0)] * (s - len(row))] for row in tableau.a]
    assert [sum(row) for row in a] == c

    def ac(v: list[Fraction]) -> list[Fraction]:
        return [sum((a[i][j] * v[j] for j in range(s)), Fraction(0)) for i in range(s)]

    def dot(u: list[Fraction], v: list[Fraction]) -> Fraction:
        return sum((x * y for x, y in zip(u, v, strict=True)), Fraction(0))

    def power(k: int) -> list[Fraction]:
        return [v**k for v in c]

    conditions = {
        1: [dot(b, power(0)) == 1],
        2: [dot(b, c) == Fraction(1, 2)],
        3: [dot(b, power(2)) == Fraction(1, 3), dot(b, ac(c)) == Fraction(1, 6)],
        4: [
            dot(b, power(3)) == Fraction(1, 4),
            dot(b, [x * y for x, y in zip(c, ac(c), strict=True)]) == Fraction(1, 8),
            dot(b, ac(power(2))) == Fraction(1, 12),
            dot(b, ac(ac(c))) == Fraction(1, 24),
        ],
    }
    assert all(all(conditions[p]) for p in range(1, tableau.order + 1))
    assert tableau.order == 4 or not all(conditions[tableau.order + 1])


def field(y: np.ndarray, s: float) -> np.ndarray:
    """A given eps(y, sigma), or velocity(x, sigma): smooth, and not linear."""
    return np.tanh(0.4 * y + np.sin(s)) - 0.3 * np.roll(y, 1) / (1 + s)


def naive_step(y: np.ndarray, s: float, end: float, tableau: str, f: Field) -> np.ndarray:
    rule, h, slopes = TABLEAUS[tableau], end - s, []
    for c, a in zip(rule.c, rule.a, strict=True):
        slopes.append(f(y + h * sum((w * d for w, d in zip(a, slopes, strict=True)), np.zeros_like(y)), s + c * h))
    return y + h * sum(w * d for w, d in zip(rule.b, slopes, strict=True))


def scheduler_on(path: str, sigmas: list[float], **options) -> SolverScheduler:
    """Scheduler whose steps lie between the sigmas (Diffusers' sense), and end with one to 0."""
    keys = {"vp": VP, "ve": EDM, "flow": {"prediction_type": "flow_prediction"}}[path]
    scheduler = SolverScheduler(**keys, solver_options=options)
    assert scheduler.schedule.path == path
    place(scheduler, np.asarray(scheduler.schedule.lambda_of_sigma(sigmas)))
    return scheduler


def states(scheduler: SolverScheduler, y: np.ndarray, f: Field = field) -> list[np.ndarray]:
    """y before every call and at the end, x on flow paths; `f` is the slope. What comes in and out is the network's."""
    out, lam, schedule = [], scheduler.grid.lambdas, scheduler.schedule
    flow = schedule.path == "flow"
    x = torch.from_numpy(y[None] * (1.0 if flow else schedule.alpha_sigma(lam[0])[0]))
    for i, t in enumerate(scheduler.timesteps):
        alpha = 1.0 if flow else schedule.alpha_sigma(lam[i])[0]
        now, sigma = x.numpy()[0] / alpha, float(schedule.sigma_at(lam[i]))
        out.append(now)
        said = f(now, sigma)
        if schedule.path == "ve":  # an EDM network: x0 = c_skip x + c_out F
            variance = sigma**2 + 0.5**2
            said = (now - sigma * said - 0.5**2 / variance * now) / (sigma * 0.5 / variance**0.5)
        x = scheduler.step(torch.from_numpy(said[None]), t, x, return_dict=False)[0]
    return [*out, x.numpy()[0]]


Y = np.array([1.5, -2.0, 1.0, 0.5])


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("tableau", TABLEAUS)
def test_whole_run_is_a_naive_runge_kutta_loop(tableau, path):
    """Every state that the network sees, and the last step: one call, to the x0 prediction."""
    sigmas = [0.97, 0.6, 0.4, 0.12] if path == "flow" else [9.0, 4.0, 1.1, 0.3]
    scheduler = scheduler_on(path, sigmas, solver=NAMES[tableau], eta=0.0)
    stages = len(TABLEAUS[tableau].c)
    assert scheduler.grid.stages == (*[stages] * 3, 1)
    ours, y = states(scheduler, Y), Y
    for i, (s, end) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        rule, slopes = TABLEAUS[tableau if end else "euler"], []
        for j, (c, a) in enumerate(zip(rule.c, rule.a, strict=True)):
            stage = y + (end - s) * sum((w * d for w, d in zip(a, slopes, strict=True)), np.zeros_like(y))
            np.testing.assert_allclose(ours[i * stages + j], stage, rtol=1e-8, atol=1e-9)
            slopes.append(field(stage, s + c * (end - s)))
        y = naive_step(y, s, end, tableau if end else "euler", field)
    np.testing.assert_allclose(ours[-1], y, rtol=1e-8, atol=1e-9)


def test_a_step_from_huge_noise_has_one_stage_in_sigma():
    start, end = of_ve_sigma("vp", [101.0, 3.0])
    assert RungeKutta("rk4").max_stages(start, end) == 1
    assert RungeKutta("rk4").max_stages(of_ve_sigma("vp", [99.0])[0], end) == 4
    assert RungeKutta("rk4").max_stages(*of_ve_sigma("flow", [101.0, 3.0])) == 4
    assert RungeKutta("heun").max_stages(*of_ve_sigma("flow", [2.0, 0.0])) == 1


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize(
    ("tableau", "stages", "smaller"),
    [("heun", 1, "euler"), ("kutta3", 2, "heun"), ("heun3", 2, "heun"), ("rk4", 3, "kutta3"), ("rk4", 2, "heun")],
)
def test_fewer_calls_than_stages_take_a_smaller_tableau(tableau, stages, smaller, path):
    levels = nodes(path, [0.1, 0.9])
    whole, part = RungeKutta(smaller), RungeKutta(tableau)
    assert part.inner(levels, 0, stages) == whole.inner(levels, 0, stages)
    assert part.rows(levels, 0, stages) == whole.rows(levels, 0, stages)


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_three_stages_cut_short_are_those_of_two_or_one(eta, prediction):
    levels = nodes("vp", [0.1, 0.9])
    three, two = (ExponentialRungeKutta(k, prediction, eta=eta) for k in (3, 2))
    assert three.rows(levels, 0, 2) == two.rows(levels, 0, 2)
    assert three.inner(levels, 0, 2) == two.inner(levels, 0, 2)
    first = ExponentialAdams(1, prediction=prediction, eta=eta).predict(levels[1], levels[:1], 1)
    (row,) = three.rows(levels, 0, 1)
    assert (row.x, row.x0, row.noise, *row.m) == pytest.approx((first.x, first.x0, first.noise, *first.m), abs=1e-14)


@pytest.mark.parametrize("solver", [RungeKutta("heun"), ExponentialRungeKutta(2), ExponentialRungeKutta(3, "epsilon")])
@pytest.mark.parametrize("path", SCHEDULES)
def test_first_row_uses_the_sample_and_the_others_its_start(solver: Singlestep, path):
    first, *rest = solver.rows(nodes(path, [0.1, 0.9]), 0, solver.stages)
    assert first.anchor == 0
    assert all(row.x == 0 and row.anchor > 0 for row in rest)
    assert not math.isnan(sum(row.anchor for row in rest))
