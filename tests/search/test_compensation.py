"""The rule of DC-Solver on numbers worked out by hand, and the cascade against the published values."""

import numpy as np
import pytest
import torch

from diffaccel.samplers.compensation import SD21, CascadePolynomial, compensation, lagrange
from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search.rollout import rollout
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import tabulate
from tests import tiny
from tests.search.problems import SCHEDULES, mixture

BEFORE_CORRECTORS = ["dpmpp_2m", "ddim", "unipc", "deis_tab2", "ipndm"]


def test_three_predictions_by_hand():
    """The parabola through (1, a), (3, b), (4, c), newest first, at 0.5 * 1 + 0.5 * 3 = 2."""
    refine = compensation([1.0, 1.0, 0.5])
    weights = refine(2, np.array([1.0, 3.0, 4.0]))
    # a: (2-3)(2-4) / ((1-3)(1-4)) = 1/3; b: (2-1)(2-4) / ((3-1)(3-4)) = 1; c: (2-1)(2-3) / ((4-1)(4-3)) = -1/3
    np.testing.assert_allclose(weights, [1 / 3, 1.0, -1 / 3], rtol=1e-12)
    np.testing.assert_allclose(compensation([1.0, 1.0, 0.0])(2, np.array([1.0, 3.0, 4.0])), [0, 1, 0], atol=1e-15)


def test_only_the_newest_predictions_are_used():
    four = np.array([1.0, 3.0, 4.0, 9.0])
    np.testing.assert_allclose(
        compensation([1.0] * 3 + [0.5])(3, four), compensation([1.0, 1.0, 0.5])(2, four[:3]), rtol=1e-12
    )
    assert len(compensation([1.0] * 3 + [0.5], order=3)(3, four)) == 4


def test_nothing_happens_at_one_or_without_history():
    times = np.array([1.0, 3.0, 4.0])
    assert compensation([1.0, 1.0, 1.0])(2, times) is None
    assert compensation([0.5, 0.5, 0.5])(1, times[:2]) is None


def test_polynomials_are_followed_exactly():
    nodes = np.array([0.3, 1.0, 4.0])
    assert lagrange(2.0, nodes) @ (nodes**2 - 3 * nodes + 1) == pytest.approx(4 - 6 + 1)


@pytest.mark.parametrize("name", BEFORE_CORRECTORS)
def test_ratios_of_one_are_the_solver(name):
    schedule = SCHEDULES["vp"]
    grid = time_grid(schedule, 6, "linspace", final="sigma_min")
    plain = tabulate(schedule, grid, SOLVERS[name])
    assert tabulate(schedule, grid, SOLVERS[name], refine=compensation([1.0] * 6)).rows == plain.rows
    assert (
        tabulate(schedule, grid, SOLVERS[name], refine=compensation([1.0] * 3 + [0.9] + [1.0] * 2)).rows != plain.rows
    )


def test_a_compensated_run_by_hand():
    """UniPC as solvers.md 1 has it: the compensated prediction is used by predictor, next corrector and later steps."""
    problem, ratios, n = mixture(SCHEDULES["vp"], 3), [1.0, 1.0, 0.8, 1.2, 0.9], 5
    schedule = problem.schedule
    grid = time_grid(schedule, n, "linspace", final="sigma_min")
    lam, t = grid.lambdas, grid.timesteps
    y = problem.noise / schedule.alpha_sigma(lam[0])[0]
    kept: list[torch.Tensor] = []  # newest last
    before = None  # where the last step began
    for i in range(n):
        m = problem.denoise(schedule.alpha_sigma(lam[i])[0] * y, lam[i], float(t[i]))
        if i:  # B2(h): the corrector weighs (m_t - m_0) by the half of 1 - e^-h, after the older difference
            h = lam[i] - lam[i - 1]
            area = 1 - np.exp(-h)
            if i == 1:
                y = np.exp(-h) * before + area * (kept[-1] + (m - kept[-1]) / 2)
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                # weights of D_1 (older, at r) and D_t (at 1): sum rho = moments of B2, see UniPC, eq. 8
                older, newest = (kept[-2] - kept[-1]) / r, m - kept[-1]
                z = -h  # moments of e^(-(h - u)): phi_2, phi_3 scaled
                b1 = ((np.exp(z) - 1) / z - 1) / (np.exp(z) - 1)
                b2 = (((np.exp(z) - 1) / z - 1) / z - 0.5) * 2 / (np.exp(z) - 1)
                rho = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), [b1, b2])
                y = np.exp(-h) * before + area * (kept[-1] + rho[0] * older + rho[1] * newest)
        kept.append(m)
        if i >= 2 and ratios[i] != 1:
            at = ratios[i] * t[i] + (1 - ratios[i]) * t[i - 1]
            kept[-1] = sum(w * v for w, v in zip(lagrange(at, t[i - 2 : i + 1][::-1]), kept[::-1], strict=False))
        before, h = y, lam[i + 1] - lam[i]
        slope = 0 if i in (0, n - 1) else (kept[-1] - kept[-2]) / ((lam[i] - lam[i - 1]) / h)  # the last is lowered
        y = np.exp(-h) * y + (1 - np.exp(-h)) * (kept[-1] + slope / 2)
    found = rollout(problem, tabulate(schedule, grid, SOLVERS["unipc"], refine=compensation(ratios)))
    assert tiny.relative(found, schedule.alpha_sigma(lam[-1])[0] * y) < 1e-9


def test_the_published_values_of_stable_diffusion_2_1():
    cascade = CascadePolynomial.named("sd21")
    five = [1, 1, 1.0270600481, 0.7392445289, 1.2262707508]
    ten = [1, 1, 0.445, 0.898, 1.063, 1.043, 0.941, 0.861, 0.907, 1.182]
    np.testing.assert_allclose(cascade.ratios(5, 7.5), five, atol=1e-6)
    np.testing.assert_allclose(cascade.ratios(10, 7.5), ten, atol=6e-4)


def test_a_fit_gives_back_the_cascade():
    """Three numbers of steps and of guidance scales fix it; it is told from others where it was not searched."""
    cascade = CascadePolynomial.named(SD21)
    found = [(n, g, cascade.ratios(n, g)) for n in (6, 8, 12) for g in (1.5, 5.0, 9.0)]
    fitted = CascadePolynomial.fit(found)
    for n, g, ratios in [*found, (10, 7.5, cascade.ratios(10, 7.5)), (7, 3.0, cascade.ratios(7, 3.0))]:
        np.testing.assert_allclose(fitted.ratios(n, g), ratios, rtol=1e-5, atol=1e-5)


def test_a_fit_of_one_search_follows_it_and_stays_near_one():
    """Twelve numbers from one search are not enough for 36: the smallest that fit, around 1."""
    ratios = [1.0, 1.0, 0.9, 1.1, 1.05, 0.95]
    fitted = CascadePolynomial.fit([(6, 7.5, ratios)])
    np.testing.assert_allclose(fitted.ratios(6, 7.5), ratios, atol=1e-6)
    np.testing.assert_allclose(fitted.ratios(5, 7.0), 1.0, atol=0.3)
    plain = CascadePolynomial.fit([(6, 7.5, [1.0] * 6), (10, 5.0, [1.0] * 10)])
    np.testing.assert_allclose(plain.ratios(8, 3.0), 1.0, atol=1e-9)


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="unknown cascade 'sdxl'; use 'sd21', or 36"):
        CascadePolynomial.named("sdxl")
    with pytest.raises(ValueError, match="has 36 coefficients, not 3"):
        CascadePolynomial.named([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no ratios to fit"):
        CascadePolynomial.fit([(2, 7.5, [1.0, 1.0])])
