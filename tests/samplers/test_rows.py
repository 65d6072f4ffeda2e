"""Identities that every row keeps, and rows against independent formulas."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from diffaccel.samplers.exponential import ExponentialAdams, exp_moments
from diffaccel.samplers.plan import is_singlestep
from diffaccel.samplers.row import Row, edm_coefficients, memory_coefficients, rescale, x0_coefficients
from diffaccel.samplers.schedule import NoiseSchedule, betas
from diffaccel.samplers.solver import Node
from diffaccel.samplers.solvers import SOLVERS

NODES = [0.7, 0.1, -0.2, -0.9]  # newest first
VP = NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000)))
SCHEDULES = {
    "vp": VP,
    "ve": NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 100), "ve"),
    "flow": NoiseSchedule.rectified_flow(1000),
}


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("h", [1e-4, 0.01, 0.4999, 0.5, 0.9, 1.1, 3.0])
def test_moments_match_quadrature(h, rate):
    expected = [quad(lambda u, k=k: rate * math.exp(-rate * (h - u)) * u**k, 0, h, epsabs=0)[0] for k in range(5)]
    np.testing.assert_allclose(exp_moments(h, rate, 5), expected, rtol=1e-9)


def at(*lams: float, schedule: NoiseSchedule = VP) -> list[Node]:
    return [Node(lam, schedule) for lam in lams]


@pytest.mark.parametrize("h", [0.05, 0.6, 2.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_without_noise_stays_where_it_is(name, h):
    """If y and every x0 prediction are the same picture, it is the next y too; eps and slopes are 0 there."""
    solver = SOLVERS[name]
    if is_singlestep(solver):
        for stages in range(1, solver.stages + 1):
            rows = solver.rows(at(0.1, 0.1 + h, 3.5), 0, stages)
            assert len(rows) == stages
            rows_sum_to_one(rows, solver.memory)
    else:
        for order in range(1, solver.order + 1):
            rows_sum_to_one([solver.predict(*at(NODES[0] + h), at(*NODES), order)], solver.memory)


def rows_sum_to_one(rows, memory):
    for row in rows:
        total = row.x + row.anchor + row.x0 + (sum(row.m) if memory == "x0" else 0.0)
        assert total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynomials_below_the_order_are_integrated_exactly(order, corrector, prediction):
    """Of half log-SNR: y' = e^-h y + int e^-(h-u) x0 du, or y' = y - int e^-lambda eps dlambda."""
    solver, h = ExponentialAdams(order=order, prediction=prediction), 0.6
    end, known, sigma = Node(NODES[0] + h, VP), at(*NODES), np.exp(-NODES[0])
    row = solver.predict(end, known, order)
    redo = solver.correct(end, known, known[0], order)
    for k in range(order + corrector):
        if prediction == "x0":
            truth = quad(lambda u, k=k: math.exp(-(h - u)) * (NODES[0] + u) ** k, 0, h)[0]
        else:
            truth = -quad(lambda u, k=k: sigma * math.exp(-u) * (NODES[0] + u) ** k, 0, h)[0]
        memory = np.power(NODES[:order], k)
        y = sigma * NODES[0] ** k  # where x0 = 0, so that eps = y / sigma agrees with the memory
        made = np.dot(row.m, memory) + row.x * (0 if prediction == "x0" else y)
        made -= 0 if prediction == "x0" else y
        if corrector:
            late = np.dot(redo.m, np.power([end.lam, *NODES[:order]], k))
            made = late if prediction == "x0" else made + late
        assert float(made) == pytest.approx(truth, abs=1e-10)


def test_halved_curvature_misses_half_of_a_parabola():
    exact, shipped = (
        ExponentialAdams(order=3, halve_curvature=flag).predict(*at(NODES[0] + 0.6), at(*NODES), 3)
        for flag in (False, True)
    )
    offsets = np.array(NODES[:3]) - NODES[0]
    assert np.dot(shipped.m, offsets**2) == pytest.approx(np.dot(exact.m, offsets**2) / 2)
    assert np.dot(shipped.m, offsets) == pytest.approx(np.dot(exact.m, offsets))


@pytest.mark.parametrize("path", SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_rows_to_sigma_zero_keep_a_sample_whose_predictions_agree(name, path):
    """If all predictions are of one x0 and one eps, the step to zero ends on that x0; no noise is added there."""
    solver, schedule, x0, eps = SOLVERS[name], SCHEDULES[path], 0.7, -1.3
    last = Node(0.4, schedule)
    memory = {"x0": x0, "epsilon": eps, "slope": eps - x0 if path == "flow" else eps}[solver.memory]
    zero = Node(math.inf, schedule)
    if is_singlestep(solver):
        (row,) = solver.rows([last, zero], 0, solver.max_stages(last, zero))
    else:
        row = solver.predict(zero, at(0.4, -0.1, -0.3, -0.9, schedule=schedule), solver.order)
    sample = (last.alpha * x0 + last.schedule.alpha_sigma(0.4)[1] * eps) / last.frame(solver.memory)
    assert row.x * sample + row.x0 * x0 + sum(row.m) * memory == pytest.approx(x0, rel=1e-9)
    assert row.noise == 0


def test_noise_keeps_the_variance_of_pure_noise():
    """With x0 = 0 the marginal of y is N(0, exp(-2 lambda)): the step must keep it at every eta."""
    for eta in (0.3, 1.0, 2.0):
        row = ExponentialAdams(order=1, eta=eta).predict(*at(0.9), at(0.2), 1)
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
    sample = alpha * x0 + sigma * eps
    assert p * sample + q * output == pytest.approx(x0)
    for memory, kept in (("x0", x0), ("epsilon", eps), ("slope", eps - x0 if path == "flow" else eps)):
        p, q = memory_coefficients(memory, alpha, sigma, path)
        assert p * sample + q * x0 == pytest.approx(kept)


def test_edm_coefficients_are_karras_table_1():
    assert edm_coefficients("epsilon", 2.0, 0.5) == pytest.approx((0.25 / 4.25, 1.0 / 4.25**0.5))


def test_rescaled_row_acts_on_x():
    row = rescale(Row(0.5, (0.3, 0.2), 0.1), frame_from=0.4, frame_to=0.8)
    assert (row.x, *row.m, row.noise) == pytest.approx((1.0, 0.24, 0.16, 0.08))
