"""DEIS, iPNDM, accelerated DDIM, gradient estimation and DualFast against their printed formulas and quadrature."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad

from diffaccel.samplers.adams_bashforth import AdamsBashforth
from diffaccel.samplers.dual_fast import DualFast
from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.gradient_estimation import GradientEstimation
from diffaccel.samplers.plan import is_singlestep
from diffaccel.samplers.solver import Multistep, Node
from diffaccel.samplers.solvers import SOLVERS
from tests.samplers.levels import SCHEDULES, apply, nodes, of_ve_sigma, random_nodes
from tests.samplers.test_runge_kutta_rules import Y, field, scheduler_on, states

PATHS = pytest.mark.parametrize("path", SCHEDULES)
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
IRREGULAR = [10, 8.9, 7.1, 6.3, 3.9, 2.0]
MULTISTEP = {name: rule for name, rule in SOLVERS.items() if not is_singlestep(rule)}
MIXABLE = [n for n, rule in MULTISTEP.items() if rule.memory == "x0" or not rule.stochastic]  # by DualFast


def weights(solver: Multistep, end: Node, known: Sequence[Node]) -> np.ndarray:
    """Weights of the slopes at `known` in y' = y + sum_j w_j slope_j, whatever form the row has."""
    row, sigma = solver.predict(end, known, len(known)), known[0].frame_sigma(solver.memory)
    assert row.x + row.x0 == pytest.approx(1)
    one_by_one = np.eye(len(known))
    return np.array([apply(row, 0.0, slopes, x0=-sigma * slopes[0]) for slopes in one_by_one])


def lagrange(points: Sequence[float], j: int) -> Callable[[float], float]:
    return lambda v: math.prod((v - p) / (points[j] - p) for i, p in enumerate(points) if i != j)


def piecewise(f: Callable[[float], float], a: float, b: float, kinks: Sequence[float] = ()) -> float:
    edges = sorted({a, b, *(k for k in kinks if min(a, b) < k < max(a, b))}, reverse=b < a)
    return sum(quad(f, lo, hi, epsabs=1e-13, epsrel=1e-11)[0] for lo, hi in pairwise(edges))


@SEEDS
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_t_ab_on_a_discrete_schedule(order, seed):
    """C_ij of DEIS, eq. 15: x' = Psi x + sum_j C_ij eps_j on a table of betas; log-SNR is linear in between."""
    *known, end = random_nodes("vp", order + 1, seed)
    known, schedule = known[::-1], SCHEDULES["vp"]
    times = [n.time for n in known]

    def alpha_bar(t: float) -> float:
        return 1 / (1 + math.exp(-2 * float(schedule.lambda_at(t))))

    def integrand(t: float, j: int) -> float:
        ab, low = alpha_bar(t), math.floor(t)
        slope = 2 * float(schedule.lambdas[low + 1] - schedule.lambdas[low]) * (1 - ab)  # d log(alpha_bar) / dt
        psi = math.sqrt(alpha_bar(end.time) / ab)
        return psi * -0.5 * slope / math.sqrt(1 - ab) * lagrange(times, j)(t)

    grid = range(math.ceil(end.time), math.floor(known[0].time) + 1)
    printed = [piecewise(lambda t, j=j: integrand(t, j), known[0].time, end.time, grid) for j in range(order)]
    np.testing.assert_allclose(end.alpha * weights(AdamsBashforth(order, "time"), end, known), printed, rtol=1e-5)


@pytest.mark.parametrize("path", ["ve", "flow"])
@SEEDS
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_t_ab_on_the_other_clocks(order, seed, path):
    """EDM tells 0.25 log sigma; on flow paths time is sigma, and t-AB is rho-AB."""
    *known, end = random_nodes(path, order + 1, seed)
    known = known[::-1]
    clock = (lambda s: 0.25 * math.log(s)) if path == "ve" else (lambda s: 1000 * s)
    points = [clock(n.sigma) for n in known]
    expected = [
        quad(lambda s, j=j: lagrange(points, j)(clock(s)), known[0].sigma, end.sigma, epsrel=1e-12)[0]
        for j in range(order)
    ]
    np.testing.assert_allclose(weights(AdamsBashforth(order, "time"), end, known), expected, rtol=1e-8)
    if path == "flow":
        np.testing.assert_allclose(weights(AdamsBashforth(order), end, known), expected, rtol=1e-8)


@pytest.mark.parametrize("path", ["vp", "ve"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_t_ab_to_sigma_zero_holds_the_clock_below_the_trained_noise(order, path):
    *known, end = of_ve_sigma(path, [2.0, 1.1, 0.5, 0.2, 0][4 - order :])
    known, schedule = known[::-1], SCHEDULES[path]
    least, points = math.exp(-float(schedule.lambdas[0])), [n.time for n in known]
    kinks = [*np.exp(-schedule.lambdas)] if path == "vp" else [least]
    expected = [
        piecewise(lambda s, j=j: lagrange(points, j)(float(schedule.time_at(-math.log(max(s, 1e-9))))), 0.2, 0.0, kinks)
        for j in range(order)
    ]
    np.testing.assert_allclose(weights(AdamsBashforth(order, "time"), end, known), expected, rtol=1e-4)


def closed_forms(h: float, h1: float, h2: float, h3: float = math.nan) -> dict[int, list[float]]:
    """Variable-step Adams-Bashforth of 3 and 4 points, in units of the step h; h1, h2, h3 are the steps before."""
    lead = (1 - h / (3 * (h + h1))) / 2
    t1 = lead * h * (h + h1) / (h1 * (h1 + h2))
    out = {3: [1 + h / (2 * h1) + t1, -h / (2 * h1) - (1 + h1 / h2) * t1, t1 * h1 / h2]}
    if math.isnan(h3):
        return out
    a = h1 * (h1 + h2) / (h2 * (h2 + h3))
    t2 = lead - (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
    t2 *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    out[4] = [
        1 + h / (2 * h1) + t1 + t2,
        -h / (2 * h1) - (1 + h1 / h2) * t1 - (1 + h1 / h2 + a) * t2,
        t1 * h1 / h2 + (h1 / h2 + a * (1 + h2 / h3)) * t2,
        -t2 * a * h2 / h3,
    ]
    return out


def per_step(order: int, *, sigmas: Sequence[float], path: str = "ve") -> np.ndarray:
    *known, end = of_ve_sigma(path, sigmas)
    known = known[::-1][:order]
    return weights(AdamsBashforth(order), end, known) / (end.sigma - known[0].sigma)


@PATHS
@SEEDS
@pytest.mark.parametrize("order", [3, 4])
def test_rho_ab_is_the_closed_form(order, seed, path):
    *known, end = random_nodes(path, order + 1, seed)
    known = known[::-1]
    steps = -np.diff([n.sigma for n in (end, *known)])
    ours = weights(AdamsBashforth(order), end, known) / steps[0]
    np.testing.assert_allclose(ours, closed_forms(*steps)[order], rtol=1e-9)


def test_rho_ab_on_the_grids_that_tell_ipndm_v_apart():
    karras = (np.linspace(14.6146 ** (1 / 7), 0.029167 ** (1 / 7), 11) ** 7)[:6]
    np.testing.assert_allclose(per_step(3, sigmas=IRREGULAR), [1.84939, -2.21007, 1.36068], atol=1e-5)
    np.testing.assert_allclose(per_step(4, sigmas=IRREGULAR), [2.25953, -5.36500, 4.77852, -0.67305], atol=1e-5)
    np.testing.assert_allclose(per_step(4, sigmas=karras), [1.60093, -0.83409, 0.26470, -0.03154], atol=1e-5)


@PATHS
@SEEDS
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rho_ab_reaches_sigma_zero(order, seed, path):
    *known, _ = random_nodes(path, order + 1, seed)
    known, (end,) = known[::-1], of_ve_sigma(path, [0])
    points = [n.sigma for n in known]
    expected = [quad(lagrange(points, j), points[0], 0.0)[0] for j in range(order)]
    np.testing.assert_allclose(weights(AdamsBashforth(order), end, known), expected, rtol=1e-9)


@PATHS
@SEEDS
@pytest.mark.parametrize("name", ["deis_logrho1", "deis_logrho2"])
def test_log_rho_ab(name, seed, path):
    solver = SOLVERS[name]
    *known, end = random_nodes(path, solver.order + 1, seed)
    known = known[::-1]
    points, rho = [-n.lam for n in known], [n.ve_sigma for n in (known[0], end)]
    expected = [quad(lambda s, j=j: lagrange(points, j)(math.log(s)), *rho, epsrel=1e-11)[0] for j in range(len(known))]
    np.testing.assert_allclose(weights(solver, end, known), expected, rtol=1e-9)


@PATHS
@pytest.mark.parametrize(
    ("points", "constants"),
    [(1, [1]), (2, [3 / 2, -1 / 2]), (3, [23 / 12, -16 / 12, 5 / 12]), (4, [55 / 24, -59 / 24, 37 / 24, -9 / 24])],
)
def test_ipndm_has_the_weights_of_even_steps_everywhere(points, constants, path):
    """And on a flow path the step is in sigma itself, as k-diffusion's `sample_ipndm` does it."""
    *known, end = random_nodes(path, points + 1, 3)
    known = known[::-1]
    expected = (end.sigma - known[0].sigma) * np.array(constants)
    np.testing.assert_allclose(weights(SOLVERS["ipndm"], end, known), expected, rtol=1e-12)


def test_ipndm_on_even_steps_is_rho_ab():
    *known, end = of_ve_sigma("ve", [5, 4, 3, 2, 1])
    ours = weights(SOLVERS["ipndm"], end, known[::-1])
    np.testing.assert_allclose(ours, weights(SOLVERS["deis_rhoab3"], end, known[::-1]), rtol=1e-10)


@SEEDS
def test_accelerated_ddim_is_its_printed_formula(seed):
    older, start, end = random_nodes("vp", 3, seed)
    y, eps, eps_older = np.random.default_rng(seed).normal(size=3)
    before, ab, after = (n.alpha**2 for n in (older, start, end))
    x0 = y - start.ve_sigma * eps
    ddim = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
    bracket = ab * math.sqrt(1 - after) / math.sqrt(after) + math.asin(math.sqrt(after))
    bracket -= ab * math.sqrt(1 - ab) / math.sqrt(ab) + math.asin(math.sqrt(ab))
    printed = ddim + math.sqrt(after) / (ab - before) * bracket * (eps_older - eps)
    row = SOLVERS["accelerated_ddim"].predict(end, [start, older], 2)
    assert end.alpha * apply(row, y, [eps, eps_older], x0) == pytest.approx(printed, rel=1e-10)


@PATHS
@SEEDS
@pytest.mark.parametrize("mu", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 2.8])
def test_gradient_estimation_is_its_printed_formula(gamma, mu, seed, path):
    older, start, end = random_nodes(path, 3, seed)
    y, eps, eps_older, z = np.random.default_rng(seed).normal(size=4)
    solver = GradientEstimation(gamma, mu)
    down = (end.ve_sigma / start.ve_sigma**mu) ** (1 / (1 - mu))
    for known, average in (([start], eps), ([start, older], gamma * eps + (1 - gamma) * eps_older)):
        row = solver.predict(end, known, len(known))
        printed = y + (down - start.ve_sigma) * average + math.sqrt(end.ve_sigma**2 - down**2) * z
        ours = apply(row, y, [eps, eps_older], x0=y - start.ve_sigma * eps, noise=z)
        assert ours == pytest.approx(printed, rel=1e-11)


@PATHS
@SEEDS
@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
def test_dual_fast_around_ddim_on_noise_is_gradient_estimation(strength, seed, path):
    older, start, end = random_nodes(path, 3, seed)
    y, eps, eps_older = np.random.default_rng(seed).normal(size=3)
    sigma = start.ve_sigma * start.alpha
    gamma = 1 + strength * start.alpha**2 / (start.alpha**2 + sigma**2)
    x0 = y - start.ve_sigma * eps
    ours, theirs = (
        apply(solver.predict(end, [start, older], 2), y, [eps, eps_older], x0)
        for solver in (DualFast(ExponentialAdams(1, prediction="epsilon"), strength), GradientEstimation(gamma))
    )
    assert ours == pytest.approx(theirs, rel=1e-12)


@SEEDS
def test_ipndm_of_order_2_is_gradient_estimation_with_gamma_3_half(seed):
    older, start, end = random_nodes("vp", 3, seed)
    y, eps, eps_older = np.random.default_rng(seed).normal(size=3)
    x0 = y - start.ve_sigma * eps
    rows = [rule.predict(end, [start, older], 2) for rule in (SOLVERS["ipndm_2"], GradientEstimation(1.5))]
    ours, theirs = (apply(row, y, [eps, eps_older], x0) for row in rows)
    assert ours == pytest.approx(theirs, rel=1e-12)


@PATHS
@pytest.mark.parametrize("name", MIXABLE)
def test_dual_fast_mixes_an_older_prediction_into_the_first_order_term_alone(name, path):
    """m_0 -> (1 + c) m_0 - c m_1 in the first-order row; the rest of the row, its noise included, stays."""
    inner, strength = MULTISTEP[name], 0.7
    known = random_nodes(path, max(2, inner.order) + 1, 4)
    end, known = known[-1], known[-2::-1]
    y, z, *m = np.random.default_rng(5).normal(size=2 + len(known)).tolist()

    def newest_x0(m0: float) -> float:
        return m0 if inner.memory == "x0" else y - known[0].frame_sigma(inner.memory) * m0

    def value(solver: Multistep, order: int, memory: list[float]) -> float:
        return apply(solver.predict(end, known, order), y, memory, newest_x0(memory[0]), noise=z)

    c = strength / (1 + known[0].ve_sigma ** 2)
    first = inner if name != "gradient_estimation" else GradientEstimation(gamma=1.0)
    mixed = [(1 + c) * m[0] - c * m[1], *m[1:]]
    expected = value(inner, inner.order, m) + value(first, 1, mixed) - value(first, 1, m)
    outer = DualFast(inner, strength)
    assert value(outer, outer.order, m) == pytest.approx(expected, rel=1e-9)
    assert value(DualFast(inner, 0.0), outer.order, m) == pytest.approx(value(inner, inner.order, m), rel=1e-14)
    assert DualFast(inner, strength).predict(end, known[:1], 1) == inner.predict(end, known[:1], 1)


@pytest.mark.parametrize("name", [n for n in MIXABLE if MULTISTEP[n].can_correct])
def test_dual_fast_corrects_as_the_solver_does(name):
    inner = MULTISTEP[name]
    known = nodes("vp", [-1.0, -0.2, 0.3, 0.9, 1.7])
    end, known = known[-1], known[-2::-1]
    assert DualFast(inner, 2.0).correct(end, known, known[0], 2) == inner.correct(
        end, known, known[0], min(2, inner.order)
    )


@pytest.mark.parametrize("points", [1, 2, 3])
def test_corrected_run_is_a_naive_predict_evaluate_correct_loop(points):
    """The slope found at the predicted sample is what the next predictor uses, from the corrected sample on (PEC)."""
    sigmas = [9.0, 4.0, 2.5, 1.1, 0.6, 0.3]
    scheduler = scheduler_on("vp", sigmas, solver="deis_rhoab1", order=points, corrector=True)
    known = of_ve_sigma("vp", sigmas)
    y, slopes, seen, corrected = Y, [], [], Y
    for i, now in enumerate(known):
        seen.append(y)
        slopes = [field(y, now.sigma), *slopes]
        if i:
            used = min(points, i)
            w = moulton(known[i - 1].sigma, now.sigma, [n.sigma for n in known[i::-1][: used + 1]])
            corrected = corrected + sum(v * d for v, d in zip(w, slopes, strict=False))
        end = [*sigmas, 0.0][i + 1]
        w = moulton(now.sigma, end, [n.sigma for n in known[i::-1][:points]])
        y = corrected + sum(v * d for v, d in zip(w, slopes, strict=False))
    np.testing.assert_allclose(states(scheduler, Y), [*seen, y], rtol=1e-7, atol=1e-8)


def moulton(start: float, end: float, points: list[float]) -> list[float]:
    return [quad(lagrange(points, j), start, end)[0] for j in range(len(points))]


@pytest.mark.parametrize("name", ["deis_tab2", "deis_tab3", "deis_rhoab3", "accelerated_ddim"])
def test_order_is_lowered_where_a_step_is_far_longer_than_those_before(name):
    """Weights of 1e13 steps would leave nothing of a float32 run, and little of a float64 one."""
    levels = nodes("vp", [-2.0, -1.9999, -1.9998, -1.9997, 3.0])
    end, known = levels[-1], levels[-2::-1]
    rule = SOLVERS[name]
    assert isinstance(rule, AdamsBashforth)
    row = rule.predict(end, known, rule.order)
    assert sum(map(abs, row.m)) < 2e4 * known[0].ve_sigma
