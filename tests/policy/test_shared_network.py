"""A network with a policy, called by another pipeline: the step is right, or the run is refused."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

import diffaccel
from tests.policy import calls, smaller, toy
from tests.tiny import draw


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
@pytest.mark.parametrize("before", [None, 4, 24], ids="before {}".format)
@pytest.mark.parametrize("steps", [4, 12])
def test_another_scheduler(kind, before, steps):
    """It is refused within the run; where timesteps are the same and nothing but they tell the step, it works."""
    pipe, call = toy("sd")
    config = {**pipe.scheduler.config, "skip_prk_steps": True}
    pipe.scheduler = kind.from_config(config)
    other = copy.copy(pipe)  # as `StableDiffusionPipeline(**pipe.components)`
    other.scheduler = kind.from_config(config)
    with diffaccel.stitch(pipe, smaller(pipe), 0.5) as handle:
        if before:
            draw((pipe, call), pipe.scheduler, before)
        if kind is DDIMScheduler and before == steps:
            draw((other, call), other.scheduler, steps)
            assert calls(handle) == {"small": steps // 2, "full": steps // 2}
            return
        with pytest.raises(ValueError, match=r"to the pipeline that you call|call scheduler.set_timesteps"):
            draw((other, call), other.scheduler, steps)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("until", [1, 3])
def test_another_scheduler_after_an_interrupted_run(kind, until):
    pipe, call = toy("sd")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    other = copy.copy(pipe)
    other.scheduler = kind.from_config(pipe.scheduler.config)

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == until
        return kwargs

    with diffaccel.stitch(pipe, smaller(pipe), 0.5):
        draw((pipe, call), pipe.scheduler, 8, callback_on_step_end=stop)
        with pytest.raises(ValueError, match="attach it to the pipeline that you call"):
            draw((other, call), other.scheduler, 4)


def test_the_same_scheduler():
    pipe, _ = toy("sd")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    picture = toy("sd_img2img")[1]
    with diffaccel.stitch(pipe, smaller(pipe), 0.6) as handle:
        draw((other, picture), other.scheduler, 10)
        assert calls(handle) == {"small": 2, "full": 4}
