"""Image-to-image strength: the calls that the pipeline makes, spread over the noise below it."""

import math

import diffusers
import numpy as np
import pytest
import torch

import diffaccel
from diffaccel.samplers.catalog import SCHEDULES
from diffaccel.samplers.grid import preceded, time_grid
from diffaccel.samplers.request import strength_calls
from diffaccel.samplers.schedule import NoiseSchedule, betas
from diffaccel.samplers.spacing import NEVER_FLOW
from tests import tiny

SD = NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000)))
EDM = NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 1000), "ve")
FLOW = NoiseSchedule.rectified_flow(1000)
PATHS = {"sd": SD, "edm": EDM, "flow": FLOW}
VP_CONFIG = diffusers.DDIMScheduler(**tiny.SD_BETAS, clip_sample=False, steps_offset=1).config
FLOW_CONFIG = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
PIPELINES = {"sd": tiny.sd_img2img, "sd3": tiny.sd3_img2img, "flux": tiny.flux_img2img}
KINDS = (
    "trailing",
    "leading",
    "ddim_uniform",
    "beta57",
    "karras",
    "kl_optimal",
    "linear_quadratic",
    "bong_tangent",
    "logsnr",
)


def starts_at_the_top(spacing: str, name: str) -> bool:
    if spacing.startswith(("ays", "gits")):  # their networks
        return name == "sd" and spacing not in ("ays_svd", "ays_deepfloyd")
    if spacing == "flow" or spacing in NEVER_FLOW:
        return (spacing == "flow") == (name == "flow")
    return spacing not in ("leading", "ddim_uniform")  # trailing stands in for them


@pytest.mark.parametrize("strength", [0.011, 0.13, 0.5, 0.6, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 4, 7, 50, 1000])
def test_calls_are_those_that_the_pipelines_make(n, strength):
    """`get_timesteps` of the real pipelines, on a scheduler that has n timesteps."""

    class Pipe:
        class scheduler:  # noqa: N801
            timesteps, order = torch.arange(n), 1

    stable_diffusion = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(Pipe(), n, strength, "cpu")[1]
    flux = diffusers.FluxImg2ImgPipeline.get_timesteps(Pipe(), n, strength, "cpu")[1]
    assert strength_calls("flow", n, strength) == flux
    if stable_diffusion:
        assert strength_calls("vp", n, strength) == stable_diffusion
    else:
        with pytest.raises(ValueError, match="leaves none of"):
            strength_calls("vp", n, strength)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, 6, float("nan"), "0.6", None])
def test_bad_strength_is_refused_in_one_sentence(strength):
    with pytest.raises(ValueError, match="strength must lie between 0"):
        strength_calls("vp", 10, strength)


@pytest.mark.parametrize("name", PATHS)
def test_truncated_schedule_is_the_clean_part(name):
    whole = PATHS[name]
    part = whole.truncated(0.6)
    assert part.count == 600
    assert whole.truncated(1.0) is whole
    np.testing.assert_allclose(part.lambdas, whole.lambdas[: len(part.lambdas)], rtol=1e-9)
    lam = part.lambdas[3:-1] + 0.01
    np.testing.assert_allclose(part.time_at(lam), whole.time_at(lam))
    assert part.lambda_min_noise == whole.lambda_min_noise
    assert part.truncated(0.5).flow_end == whole.times[-1] or name != "flow"
    with pytest.raises(ValueError, match="leaves less than two training timesteps"):
        whole.truncated(0.0005)


def test_fractions_of_a_timestep_count():
    assert SD.truncated(0.60005).times[-1] == pytest.approx(599.05)
    assert (np.diff(SD.truncated(0.57).lambdas) < 0).all()  # 0.57 * 1000 is not 570 in binary


@pytest.mark.parametrize("final", ["zero", "sigma_min", "corrector"])
@pytest.mark.parametrize("strength", [0.05, 0.35, 0.6, 0.995])
@pytest.mark.parametrize(("spacing", "name"), [(s, p) for s in SCHEDULES for p in PATHS if starts_at_the_top(s, p)])
def test_every_spacing_starts_at_the_strength(spacing, name, strength, final):
    schedule = PATHS[name]
    part = schedule.truncated(strength)
    level = float(part.lambdas[-1]) - (math.log(3) if name == "flow" else 0)
    for n in (20, 57, 200):
        calls = strength_calls(schedule.path, n, strength)
        grid = preceded(schedule, time_grid(part, calls, spacing, final=final, shift=3.0), n - calls)
        assert len(grid.timesteps) == n
        assert (np.diff(grid.timesteps) < 0).all()
        assert (np.diff(grid.lambdas[:-1]) > 0).all()
        assert grid.lambdas[n - calls] == pytest.approx(level, abs=1e-6)


def test_where_the_grid_is_even_in_time_it_is_diffusers_cut():
    cut = time_grid(SD, 10, "trailing").lambdas[4:]
    np.testing.assert_allclose(time_grid(SD.truncated(0.6), 6, "trailing").lambdas, cut, rtol=1e-12)


def test_a_list_is_followed_from_the_strength_on():
    part = SD.truncated(0.5)
    level = float(np.exp(-part.lambdas[-1]))
    levels = SD.sigma_at(time_grid(part, 6, "ays_sd15").lambdas[:-1])
    assert levels[0] == pytest.approx(level)
    index = np.interp(
        -np.log(levels), -np.log(SD.sigma_at(time_grid(SD, 10, "ays_sd15", final="sigma_min").lambdas)), np.arange(11)
    )
    np.testing.assert_allclose(np.diff(index), (10 - index[0]) / 6)


def test_integer_clock_rounds_every_time():
    config = dict(VP_CONFIG)
    scheduler = diffaccel.scheduler("dpmpp_2m", config, schedule="karras", strength=0.6, timesteps="integer")
    scheduler.set_timesteps(11)
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps.unique().numel() == 11


def test_strength_one_and_the_default_are_the_same():
    one, none = (diffaccel.scheduler("dpmpp_2m", VP_CONFIG, schedule="karras", **s) for s in ({"strength": 1}, {}))
    assert one.config == none.config


def test_given_timesteps_and_strength_are_refused():
    scheduler = diffaccel.scheduler("dpmpp_2m", VP_CONFIG, strength=0.6)
    with pytest.raises(ValueError, match="pass no timesteps or sigmas"):
        scheduler.set_timesteps(timesteps=[999, 500, 3])


def test_fewer_calls_than_one_is_refused():
    scheduler = diffaccel.scheduler("dpmpp_2m", VP_CONFIG, strength=0.05)
    with pytest.raises(ValueError, match=r"strength 0\.05 leaves none of 10 network calls"):
        scheduler.set_timesteps(10)


def seen(toy, scheduler, steps):
    """Times that the network is told in a run of the pipeline, and the picture."""
    pipe, arguments = toy
    network = getattr(pipe, "transformer", None) or pipe.unet
    told = []
    handle = network.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(
            float(torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else 0)).max())
        ),
        with_kwargs=True,
    )
    try:
        return told, tiny.draw((pipe, arguments), scheduler, steps)
    finally:
        handle.remove()


@pytest.mark.parametrize("schedule", [None, *KINDS])
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_start_at_the_strength_whatever_the_schedule(name, schedule):
    toy = PIPELINES[name]()
    scheduler = diffaccel.scheduler("dpmpp_2m", toy[0], schedule=schedule, strength=0.6)
    told, image = seen(toy, scheduler, 11)
    assert torch.isfinite(image).all()
    calls = strength_calls("vp" if name == "sd" else "flow", 11, 0.6)
    assert len(told) == calls
    begin = scheduler.begin_index
    assert begin == 11 - calls
    assert len(scheduler.timesteps) == 11
    shift = {"sd": 1, "sd3": 3, "flux": math.exp(0.5)}[name]  # the last for a picture of the smallest size
    level = float(scheduler.schedule.truncated(0.6).lambdas[-1]) - math.log(shift)
    assert scheduler.grid.lambdas[begin] == pytest.approx(level, abs=0.05)


def test_a_karras_run_starts_at_far_more_noise_than_diffusers_cut():
    toy = tiny.sd_img2img()
    plain, ours = (diffaccel.scheduler("dpmpp_2m", toy[0], schedule="karras", **s) for s in ({}, {"strength": 0.6}))
    told = [seen(toy, s, 10)[0] for s in (plain, ours)]
    assert told[0][0] < 530 < 598 < told[1][0] < 600


def test_flux_default_grid_is_that_of_the_pipeline_where_the_strength_is_on_it():
    toy = tiny.flux_img2img()
    plain, ours = (diffaccel.scheduler("euler", toy[0], **s) for s in ({}, {"strength": 0.6}))
    assert tiny.relative(tiny.draw(toy, ours, 10), tiny.draw(toy, plain, 10)) < 1e-5


@pytest.mark.parametrize("schedule", ["karras", "exponential", "kl_optimal", "linear_quadratic", "bong_tangent"])
def test_strength_wins_over_the_sigma_max_of_the_config(schedule):
    scheduler = diffaccel.scheduler("dpmpp_2m", VP_CONFIG, schedule=schedule, strength=0.6, sigma_max=10.0)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[4] == pytest.approx(599, abs=1e-3)
    assert scheduler.sigmas[4] == pytest.approx(float(SD.sigma_at(SD.lambdas[599])), rel=1e-5)
