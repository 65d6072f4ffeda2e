"""Spacings: every N, every path, strictly decreasing noise; the quantiles behind `beta`; ends of a run."""

import math

import numpy as np
import pytest
import scipy.stats

from diffaccel.samplers.grid import grid_from_sigmas, grid_from_timesteps, time_grid
from diffaccel.samplers.schedule import NoiseSchedule, betas, zero_terminal_snr
from diffaccel.samplers.spacing import FLOW_ONLY, INDEX_SPACINGS, beta_quantile

SCHEDULES = {
    "linear": NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("linear", 1e-4, 0.02, 1000))),
    "scaled_linear": NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000))),
    "cosine": NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("squaredcos_cap_v2", 0, 0, 1000))),
    "zero_snr": NoiseSchedule.from_alphas_cumprod(
        zero_terminal_snr(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000)))
    ),
    "edm": NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 1000), "ve"),
    "flow": NoiseSchedule.rectified_flow(1000),
}
COUNTS = [*range(1, 61), 100, 250, 999, 1000]


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("spacing", [*INDEX_SPACINGS, "karras", "exponential", "logsnr", "flow"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_falls_strictly_for_every_step_count(name, spacing, final):
    schedule = SCHEDULES[name]
    if spacing in FLOW_ONLY and schedule.path != "flow":
        pytest.skip("flow spacing is for flow paths")
    for n in COUNTS:
        grid = time_grid(schedule, n, spacing, final=final, offset=1, shift=3.0)
        assert len(grid.timesteps) == n
        assert np.all(np.diff(grid.lambdas) > 0), n
        assert np.all(np.diff(grid.timesteps) < 0), n
        assert np.isfinite(grid.lambdas[:-1]).all()
        assert schedule.times[0] <= grid.timesteps[-1] < grid.timesteps[0] <= schedule.times[-1] or n == 1
        if final == "zero":
            assert math.isinf(grid.lambdas[-1])
        else:  # a run whose last call is made at sigma_min already goes on to zero
            end = schedule.lambda_min_noise - (math.log(3.0) if schedule.path == "flow" else 0)
            at_end = grid.lambdas[-2] >= end - 1e-9
            assert math.isinf(grid.lambdas[-1]) == at_end or spacing in ("karras", "exponential", "logsnr", "flow"), n


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 0.7), (1.0, 2.0)])
def test_beta_quantile_matches_scipy(a, b):
    q = np.linspace(0, 1, 201)
    np.testing.assert_allclose(beta_quantile(q, a, b), scipy.stats.beta.ppf(q, a, b), atol=2e-6)


def test_shift_is_a_translation_in_log_snr():
    schedule, s = SCHEDULES["flow"], np.linspace(0.1, 0.9, 9)
    shifted = schedule.sigma_at(schedule.lambda_of_sigma(s) - math.log(3.0))
    np.testing.assert_allclose(shifted, 3 * s / (1 + 2 * s), rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_clock_and_log_snr_are_inverse(name):
    schedule = SCHEDULES[name]
    times = np.linspace(schedule.times[1], schedule.times[-2], 57)
    np.testing.assert_allclose(schedule.time_at(schedule.lambda_at(times)), times, rtol=1e-9, atol=1e-9)


def test_last_call_at_sigma_min_goes_on_to_zero():
    """DDIM with offset 0: Diffusers' last call is a step of length zero, which wastes it and keeps the noise."""
    grid = time_grid(SCHEDULES["scaled_linear"], 10, "ddim_uniform", final="sigma_min", offset=0)
    assert grid.timesteps[-1] == 0
    assert math.isinf(grid.lambdas[-1])


def test_second_call_repeats_one_node():
    grid = time_grid(SCHEDULES["scaled_linear"], 5, "logsnr").with_second_call()
    assert len(grid.timesteps) == 6
    assert grid.lambdas[1] == grid.lambdas[2]
    assert grid.timesteps[1] == grid.timesteps[2]


def test_ays_table_gives_its_own_sigmas():
    table = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # Align Your Steps, SD 1.5
    grid = grid_from_timesteps(SCHEDULES["scaled_linear"], table, "zero")
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]
    np.testing.assert_allclose(np.exp(-np.array(grid.lambdas[:-1])), published, rtol=0.02)


@pytest.mark.parametrize("sigmas", [[1.0, 2.0], [1.0, 1.0], [1.0, -1.0], [], [0.0], [float("nan")]])
def test_sigmas_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="fall from step to step"):
        grid_from_sigmas(SCHEDULES["scaled_linear"], sigmas)
