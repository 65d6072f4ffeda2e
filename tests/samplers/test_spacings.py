"""Every spacing on every path, for every number of calls and every end; the published lists and formulas."""

import math

import numpy as np
import pytest
import scipy.stats
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from diffusers.schedulers import AysSchedules

from diffaccel.samplers.catalog import parse_schedule
from diffaccel.samplers.config import spacing_config
from diffaccel.samplers.grid import grid_from_timesteps, time_grid
from diffaccel.samplers.schedule import NoiseSchedule, betas
from diffaccel.samplers.spacing import FLOW_ONLY, NEVER_FLOW, SPACINGS
from diffaccel.samplers.tables import AYS, GITS

SD = NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000)))
COSINE = NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("squaredcos_cap_v2", 0, 0, 1000)))
EDM = NoiseSchedule.from_sigmas(np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 1000) ** 7, "ve")
SVD = NoiseSchedule.from_sigmas(np.linspace(0.002 ** (1 / 7), 700 ** (1 / 7), 1000) ** 7, "vp")
FLOW = NoiseSchedule.rectified_flow(1000)
PATHS = {"sd": SD, "cosine": COSINE, "edm": EDM, "svd": SVD, "flow": FLOW}
COUNTS = [1, 2, 3, 5, 8, 10, 20, 50, 200, 1000]
# Lists are for the networks they were made for: here, those trained on their whole range.
TABLES = {
    "ays_sd15": {"sd", "cosine", "svd"},
    "ays_sdxl": {"sd", "cosine", "svd"},
    "gits_sd15": {"sd", "cosine", "svd"},
    "ays_svd": {"svd"},
    "ays_deepfloyd": {"cosine", "svd"},
}


def runs_on(spacing: str, name: str) -> bool:
    if spacing in TABLES:
        return name in TABLES[spacing]
    return name == "flow" if spacing in FLOW_ONLY else name != "flow" or spacing not in NEVER_FLOW


def sigmas(schedule: NoiseSchedule, n: int, spacing: str, **options) -> np.ndarray:
    return schedule.sigma_at(time_grid(schedule, n, spacing, **options).lambdas)


@pytest.mark.parametrize("final", ["zero", "sigma_min", "corrector"])
@pytest.mark.parametrize(("spacing", "name"), [(s, p) for s in SPACINGS for p in PATHS if runs_on(s, p)])
def test_exactly_n_calls_at_falling_noise(spacing, name, final):
    schedule = PATHS[name]
    for n in COUNTS:
        grid = time_grid(schedule, n, spacing, final=final, shift=3.0)
        assert len(grid.timesteps) == n
        assert np.isfinite(grid.timesteps).all()
        assert schedule.times[0] <= grid.timesteps[-1]
        assert grid.timesteps[0] <= schedule.times[-1]
        corrects = final == "corrector" and n > 1
        lam = grid.lambdas[:-1] if corrects else grid.lambdas
        assert (np.diff(lam) > 0).all(), n
        assert (np.diff(grid.timesteps) < 0).all(), n
        if final == "zero" or (n == 1 and final == "corrector"):
            assert math.isinf(grid.lambdas[-1])
            continue
        end = grid.lambdas[-1]
        if corrects:
            assert end == grid.lambdas[-2]
        elif math.isinf(end):  # a run whose last call is made there already goes on to 0
            end = grid.lambdas[-2]
        if spacing in TABLES:
            continue  # they have an end of their own
        least = [schedule.lambda_min_noise]
        if name == "flow":  # end of the shifted table, and Diffusers' own grid is shifted once more
            least = [least[0] - math.log(3), least[0] - 2 * math.log(3)]
        assert any(end == pytest.approx(v, abs=1e-9) for v in least) or (name == "flow" and end > least[0]), n


@pytest.mark.parametrize(("spacing", "name"), [(s, p) for s in SPACINGS for p in PATHS if not runs_on(s, p)])
def test_spacing_without_a_meaning_is_refused(spacing, name):
    with pytest.raises(ValueError, match=r"is (not )?for flow-matching|this network was trained from"):
        time_grid(PATHS[name], 8, spacing)


@pytest.mark.parametrize("name", NEVER_FLOW)
def test_config_of_a_flow_model_refuses_lists(name):
    with pytest.raises(ValueError, match="is not for flow-matching models"):
        spacing_config(name, flow=True)


def test_list_must_begin_at_the_noise_a_ve_pipeline_starts_from():
    wide = NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 1000), "ve")
    with pytest.raises(ValueError, match=r"goes from sigma 14.615 to 0.029 and this network was trained from 80"):
        time_grid(wide, 10, "ays_sd15")
    svd = NoiseSchedule.from_sigmas(np.geomspace(0.002, 700, 1000), "ve")
    assert sigmas(svd, 10, "ays_svd")[0] == pytest.approx(700)


@pytest.mark.parametrize(
    ("key", "name", "schedule"),
    [
        ("StableDiffusionSigmas", "ays_sd15", SD),
        ("StableDiffusionXLSigmas", "ays_sdxl", SD),
        ("StableDiffusionVideoSigmas", "ays_svd", SVD),
    ],
)
def test_ays_is_the_published_list_at_ten_calls(key, name, schedule):
    np.testing.assert_allclose(sigmas(schedule, 10, name), AysSchedules[key], atol=5e-4)
    np.testing.assert_allclose(sigmas(schedule, 10, name, final="sigma_min"), AYS[name], atol=5e-4)


def test_ays_sigmas_are_those_of_the_published_timesteps():
    for name, key in (("ays_sd15", "StableDiffusionTimesteps"), ("ays_sdxl", "StableDiffusionXLTimesteps")):
        given = SD.sigma_at(grid_from_timesteps(SD, AysSchedules[key], "zero").lambdas)
        np.testing.assert_allclose(sigmas(SD, 10, name), given, rtol=0.02)
    deepfloyd = COSINE.sigma_at(COSINE.lambda_at([995, 920, 811, 686, 555, 418, 315, 174, 109, 12, 0]))
    table = [*AYS["ays_deepfloyd"][:8], 0.186, 0.030, 0.006]
    np.testing.assert_allclose(deepfloyd, table, rtol=1e-2, atol=1e-3)


def test_lists_serve_other_numbers_by_log_linear_interpolation():
    twenty = sigmas(SD, 20, "ays_sd15", final="sigma_min")
    np.testing.assert_allclose(twenty[::2], AYS["ays_sd15"], atol=5e-4)
    np.testing.assert_allclose(twenty[1:-1:2] ** 2, twenty[:-2:2] * twenty[2::2])
    np.testing.assert_allclose(sigmas(SD, 5, "ays_sd15", final="sigma_min"), AYS["ays_sd15"][::2], atol=5e-4)


def test_gits_takes_the_next_longer_list():
    for n, table in GITS.items():
        np.testing.assert_allclose(sigmas(SD, n, "gits_sd15", final="sigma_min"), table, atol=5e-4)
    np.testing.assert_allclose(sigmas(SD, 4, "gits_sd15", final="sigma_min")[[0, -1]], [14.6146, 0.0292], atol=5e-5)
    np.testing.assert_allclose(sigmas(SD, 20, "gits_sd15", final="sigma_min")[::2], GITS[10], atol=5e-4)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10, 50, 200])
def test_linear_quadratic_is_mochis(n):
    np.testing.assert_allclose(sigmas(FLOW, n, "linear_quadratic")[:-1], linear_quadratic_schedule(n, 0.025), atol=1e-8)
    np.testing.assert_allclose(
        sigmas(FLOW, n, "linear_quadratic", shift=3.0)[:-1], linear_quadratic_schedule(n, 0.025), atol=1e-8
    )
    ends = float(np.exp(-SD.lambdas[-1])), float(np.exp(-SD.lambdas[0]))
    share = np.array(linear_quadratic_schedule(n, 0.025))
    np.testing.assert_allclose(sigmas(SD, n, "linear_quadratic")[:-1], ends[1] + (ends[0] - ends[1]) * share)


def test_kl_optimal_is_even_in_arctan_sigma():
    angles = np.arctan(sigmas(SD, 10, "kl_optimal")[:-1])
    np.testing.assert_allclose(np.diff(angles), (angles[-1] - angles[0]) / 9)
    np.testing.assert_allclose(np.tan(angles[[0, -1]]), [14.6146, 0.02917], rtol=1e-3)


def test_beta57_has_the_quantiles_of_scipy_on_the_timesteps():
    grid = time_grid(SD, 20, "beta57")
    np.testing.assert_allclose(
        grid.timesteps, 999 * scipy.stats.beta.ppf(np.linspace(1, 0, 21)[:-1], 0.5, 0.7), atol=2e-3
    )


def test_quadratic_is_even_in_the_square_root_of_time():
    np.testing.assert_allclose(
        np.sqrt(time_grid(SD, 10, "quadratic").timesteps), np.sqrt(999) * np.linspace(1, 0.1, 10)
    )


@pytest.mark.parametrize(("n", "last"), [(5, 0.572), (10, 0.344), (20, 0.226), (50, 0.138)])
def test_gradient_estimation_makes_its_last_call_at_timestep_t_over_n(n, last):
    levels = sigmas(SD, n, "gradient_estimation")
    assert levels[-2] == pytest.approx(last, abs=1e-3)
    np.testing.assert_allclose(np.diff(np.log(levels[:-1])), np.log(levels[-2] / levels[0]) / (n - 1))


@pytest.mark.parametrize("n", [2, 5, 8, 20, 100])
def test_bong_tangent_joins_two_arctangents_in_the_middle(n):
    levels = sigmas(FLOW, n, "bong_tangent")
    joint = int(0.6 * (n + 2)) - 1
    assert levels[joint] == pytest.approx(0.5, abs=1e-8)
    for piece, pivot in ((levels[: joint + 1], joint + 1), (levels[joint:], 0)):
        if len(piece) > 2:  # an affine map of the arctangent
            curve = np.arctan(8 / (n + 2) * (np.arange(len(piece)) - pivot))
            np.testing.assert_allclose(
                np.diff(piece) / np.diff(curve), np.diff(piece)[0] / np.diff(curve)[0], rtol=1e-6
            )


def test_corrector_ends_where_one_call_less_ends_at_sigma_min():
    for clock in ("float", "integer"):
        grid = time_grid(SD, 8, "karras", final="corrector", clock=clock)
        shorter = time_grid(SD, 7, "karras", final="sigma_min", clock=clock)
        assert grid.lambdas[:-1] == shorter.lambdas
        np.testing.assert_allclose(grid.timesteps, [*shorter.timesteps, 0], atol=1e-9)
    assert math.isinf(time_grid(SD, 1, "karras", final="corrector").lambdas[-1])


def test_corrector_of_given_timesteps_is_the_last_of_them():
    grid = grid_from_timesteps(SD, [999, 500, 3], "corrector")
    assert grid.lambdas[-1] == grid.lambdas[-2] == pytest.approx(float(SD.lambdas[3]))
    assert len(grid.timesteps) == 3
    assert math.isinf(grid_from_timesteps(SD, [999], "corrector").lambdas[-1])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("beta57", "beta57"),
        ("Linear Quadratic", "linear_quadratic"),
        ("kl optimal", "kl_optimal"),
        ("Bong Tangent", "bong_tangent"),
        ("align_your_steps_sd15", "ays_sd15"),
        ("AYS SDXL", "ays_sdxl"),
        ("GITS", "gits_sd15"),
    ],
)
def test_names_of_other_programs(given, name):
    assert parse_schedule(given) == name


def test_ays_without_a_model_is_ambiguous():
    with pytest.raises(ValueError, match=r"use .*ays_sd15, ays_sdxl"):
        parse_schedule("ays")
