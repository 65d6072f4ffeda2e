"""Identities that every row keeps, and rows against independent formulas."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from diffaccel.samplers.row import Row, edm_coefficients, rescale, x0_coefficients
from diffaccel.samplers.schedule import NoiseSchedule
from diffaccel.samplers.solver import SOLVERS, ExponentialAdams, exp_moments

NODES = [0.7, 0.1, -0.2, -0.9]  # newest first


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("h", [1e-4, 0.01, 0.4999, 0.5, 0.9, 1.1, 3.0])
def test_moments_match_quadrature(h, rate):
    expected = [quad(lambda u, k=k: rate * math.exp(-rate * (h - u)) * u**k, 0, h, epsabs=0)[0] for k in range(5)]
    np.testing.assert_allclose(exp_moments(h, rate, 5), expected, rtol=1e-9)


@pytest.mark.parametrize("h", [0.05, 0.6, 2.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_constant_x0_is_kept(name, h):
    """If every prediction is the same x0, y moves towards it by exactly 1 - exp(-(1 + eta) h)."""
    solver = SOLVERS[name]
    row = solver.predict(NODES[0] + h, NODES[: solver.order])
    assert sum(row.m) == pytest.approx(-math.expm1(-(1 + solver.eta) * h), rel=1e-12)
    assert row.x == pytest.approx(math.exp(-(1 + solver.eta) * h), rel=1e-12)


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynomials_below_the_order_are_integrated_exactly(order, corrector):
    solver, h = ExponentialAdams(order=order), 0.6
    known = NODES[:order]
    nodes = [NODES[0] + h, *known] if corrector else known
    row = solver.correct(NODES[0] + h, known, NODES[0]) if corrector else solver.predict(NODES[0] + h, known)
    for k in range(len(nodes)):
        truth = quad(lambda u, k=k: math.exp(-(h - u)) * (NODES[0] + u) ** k, 0, h)[0]
        assert float(np.dot(row.m, np.power(nodes, k))) == pytest.approx(truth, abs=1e-10)


def test_halved_curvature_misses_half_of_a_parabola():
    h = 0.6
    exact, shipped = (
        ExponentialAdams(order=3, halve_curvature=flag).predict(NODES[0] + h, NODES[:3]) for flag in (False, True)
    )
    offsets = np.array(NODES[:3]) - NODES[0]
    assert np.dot(shipped.m, offsets**2) == pytest.approx(np.dot(exact.m, offsets**2) / 2)
    assert np.dot(shipped.m, offsets) == pytest.approx(np.dot(exact.m, offsets))


@pytest.mark.parametrize("name", SOLVERS)
def test_last_step_to_zero_is_the_prediction(name):
    assert SOLVERS[name].predict(math.inf, NODES) == Row(0.0, (1.0,))


def test_noise_keeps_the_variance_of_pure_noise():
    """With x0 = 0 the marginal of y is N(0, exp(-2 lambda)): the step must keep it at every eta."""
    for eta in (0.3, 1.0, 2.0):
        row = ExponentialAdams(order=1, eta=eta).predict(0.9, [0.2])
        assert row.x**2 * math.exp(-0.4) + row.noise**2 == pytest.approx(math.exp(-1.8))


@pytest.mark.parametrize("path", ["vp", "flow"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_x0_comes_back_from_every_prediction(prediction, path):
    schedule = (
        NoiseSchedule.rectified_flow(1000) if path == "flow" else NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1])
    )
    alpha, sigma = schedule.alpha_sigma(0.3)
    x0, eps = 0.8, -1.7
    if prediction == "v_prediction" and path == "flow":
        pytest.skip("v is defined for variance-preserving paths")
    output = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
    }[prediction]
    p, q = x0_coefficients(prediction, alpha, sigma)
    assert p * (alpha * x0 + sigma * eps) + q * output == pytest.approx(x0)


def test_edm_coefficients_are_karras_table_1():
    assert edm_coefficients("epsilon", 2.0, 0.5) == pytest.approx((0.25 / 4.25, 1.0 / 4.25**0.5))


def test_rescaled_row_acts_on_x():
    row = rescale(Row(0.5, (0.3, 0.2), 0.1), alpha_from=0.4, alpha_to=0.8)
    assert (row.x, *row.m, row.noise) == pytest.approx((1.0, 0.24, 0.16, 0.08))
