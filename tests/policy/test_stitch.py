"""A stitched run is the run in which another hand changes the network after the same number of steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

import diffaccel
from diffaccel.samplers.policy import FULL, Grid
from diffaccel.samplers.policy.stitch import Stitch
from tests import tiny
from tests.policy import KINDS, calls, denoiser, forward, oracle, smaller, toy
from tests.tiny import SD_BETAS, draw

STEPS = 5


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("fraction", "count"), [(0, 0), (0.4, 2), (0.59, 2), (0.6, 3), (1, 5)])
def test_stitched_picture_is_that_of_the_oracle(kind, fraction, count):
    pipe, call = toy(kind)
    small = smaller(pipe)
    expected = oracle((pipe, call), [small], [count], STEPS)
    alone = draw((pipe, call), pipe.scheduler, STEPS)
    with diffaccel.stitch(pipe, small, fraction) as handle:
        assert torch.equal(draw((pipe, call), pipe.scheduler, STEPS), expected)
        assert [names[0] for names in handle.plan or ()] == ["small"] * count + [FULL] * (STEPS - count)
    assert torch.equal(expected, alone) == (count == 0)


def test_forty_percent_by_default():
    pipe, call = toy("sd")
    with diffaccel.stitch(pipe, smaller(pipe)) as handle:
        draw((pipe, call), pipe.scheduler, 10)
        assert calls(handle) == {"small": 4, FULL: 6}


def test_several_networks(kind):
    pipe, call = toy(kind)
    networks = [smaller(pipe, 1), smaller(pipe, 2)]
    expected = oracle((pipe, call), networks, [1, 2], STEPS)
    with diffaccel.stitch(pipe, networks, fraction=[0.2, 0.4]) as handle:
        assert torch.equal(draw((pipe, call), pipe.scheduler, STEPS), expected)
    assert calls(handle) == {"small 1": 1, "small 2": 2, FULL: 2}


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
@pytest.mark.parametrize("karras", [False, True])
def test_timestep_rule_follows_the_noise_level(scheduler, karras):
    if karras and scheduler is DDIMScheduler:
        pytest.skip("DDIM has no Karras schedule")
    pipe, call = toy("sd")
    small, own = smaller(pipe), scheduler(**SD_BETAS, **({"use_karras_sigmas": True} if karras else {}))
    own.set_timesteps(10)
    count = sum(float(time) >= 300 for time in own.timesteps)
    expected = oracle((pipe, call), [small], [count], 10, own)
    with diffaccel.stitch(pipe, small, timestep=300) as handle:
        assert torch.equal(draw((pipe, call), own, 10), expected)
    assert calls(handle)["small"] == count
    assert (count == 6) == karras  # the noise level, not the share of the steps


def test_timesteps_of_several_networks():
    pipe, call = toy("sd3")
    networks = [smaller(pipe, 1), smaller(pipe, 2)]
    with diffaccel.stitch(pipe, networks, timestep=[900, 500]) as handle:
        draw((pipe, call), pipe.scheduler, 10)
        times = handle.grid.timesteps
        expected = ["small 1" if t >= 900 else "small 2" if t >= 500 else FULL for t in times]
        assert [names[0] for names in handle.plan or ()] == expected
        assert len(set(expected)) == 3


@pytest.mark.parametrize("name", ["sd_img2img", "sdxl_img2img", "sd3_img2img", "flux_img2img", "sd_inpaint"])
def test_image_to_image_counts_the_steps_it_leaves_out(name):
    """At strength 0.6 the first 4 of 10 steps are not made: the small network has 2 of the first 6."""
    pipe, call = toy(name)
    small = smaller(pipe)
    expected = oracle((pipe, call), [small], [2], 10)
    with diffaccel.stitch(pipe, small, 0.6) as handle:
        assert torch.equal(draw((pipe, call), pipe.scheduler, 10), expected)
        assert (handle.grid.first, len(handle.grid)) == (4, 10)
    assert calls(handle) == {"small": 2, FULL: 4}


def test_guidance_off_and_on(kind):
    """Flux has none; the scale is that of each call, the policy has no part in it."""
    pipe, call = toy(kind)
    small = smaller(pipe)
    for scale in (1.0, 7.5):
        expected = oracle((pipe, call), [small], [2], STEPS, guidance_scale=scale)
        with diffaccel.stitch(pipe, small):
            assert torch.equal(draw((pipe, call), pipe.scheduler, STEPS, guidance_scale=scale), expected)


def test_guidance_in_two_calls():
    """Wan asks for the halves one by one."""
    pipe, call = toy("wan")
    small = smaller(pipe)
    expected = oracle((pipe, call), [small], [2], STEPS, per_step=2)
    with diffaccel.stitch(pipe, small) as handle:
        assert torch.equal(draw((pipe, call), pipe.scheduler, STEPS), expected)
    assert calls(handle) == {"small": 4, FULL: 6}


def test_two_calls_a_step_of_the_pipeline():
    """SD3 with skip-layer guidance calls its network a second time in some steps."""
    pipe, call = toy("sd3")
    small = smaller(pipe)
    more: dict[str, Any] = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 2}
    count = 0

    def counted(original: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    with forward(denoiser(pipe), counted):
        draw((pipe, call), pipe.scheduler, STEPS, **more)
    assert count == 2 * STEPS
    expected = oracle((pipe, call), [small], [2], STEPS, per_step=2, **more)
    with diffaccel.stitch(pipe, small) as handle:
        assert torch.equal(draw((pipe, call), pipe.scheduler, STEPS, **more), expected)
    assert calls(handle) == {"small": 4, FULL: 6}


def test_sums_of_shares_do_not_lose_a_step():
    for n in (10, 20, 30, 50, 100):
        grid = Grid(tuple(range(n, 0, -1)))
        tenths = Stitch(("a", "b", "c"), (0.1, 0.2, 0.7)).plan(grid, {})
        assert [names[0] for names in tenths] == ["a"] * (n // 10) + ["b"] * (n // 5) + ["c"] * (n - 3 * n // 10)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"fraction": 1.5}, "between 0 and 1"),
        ({"fraction": -0.1}, "between 0 and 1"),
        ({"fraction": float("nan")}, "between 0 and 1"),
        ({"fraction": [0.2, 0.3]}, "for each small network: 1, not"),
        ({"fraction": []}, "for each small network: 1, not"),
        ({"fraction": "0.4"}, "fraction is a number, or a list .* not '0.4'"),
        ({"fraction": ["a"]}, "fraction is a number"),
        ({"timestep": "high"}, "timestep is a number, or a list"),
        ({"timestep": -1}, "not negative"),
        ({"timestep": float("nan")}, "not negative"),
        ({"timestep": 500, "fraction": 0.4}, "not both"),
    ],
    ids=str,
)
def test_wrong_numbers(wrong, sentence):
    pipe, _ = toy("sd")
    with pytest.raises((TypeError, ValueError), match=sentence):
        diffaccel.stitch(pipe, smaller(pipe), **wrong)
    assert not hasattr(pipe.unet, "_diffusers_hook")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"fraction": [0.7, 0.7]}, "between 0 and 1"),
        ({"fraction": 0.4}, "for each small network: 2, not 1"),
        ({"timestep": [500, 900]}, "fall from network to network"),
        ({"timestep": [500, float("nan")]}, "not negative"),
    ],
    ids=str,
)
def test_wrong_numbers_of_two(wrong, sentence):
    pipe, _ = toy("sd")
    with pytest.raises(ValueError, match=sentence):
        diffaccel.stitch(pipe, [smaller(pipe, 1), smaller(pipe, 2)], **wrong)
    assert not hasattr(pipe.unet, "_diffusers_hook")


def test_no_network_at_all():
    with pytest.raises(ValueError, match="there is no small network"):
        diffaccel.stitch(tiny.sd()[0], [], [])
