"""How an error in one call moves the end: against DDIM itself, run twice."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffaccel.pruning.influence import influence

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def moved(scheduler: Any, steps: int) -> np.ndarray:
    """Squared change of the last sample for an error of 1 in each model output, by running the scheduler."""
    ends = []
    for wrong in (None, *range(steps)):
        scheduler.set_timesteps(steps)
        sample = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
        for i, time in enumerate(scheduler.timesteps):
            output = torch.full_like(sample, 0.1) + (i == wrong)
            sample = scheduler.step(output, time, sample).prev_sample
        ends.append(float(sample))
    effect = (np.array(ends[1:]) - ends[0]) ** 2
    return effect / effect.mean()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_it_is_what_ddim_makes_of_an_error(prediction):
    # `set_alpha_to_one` ends at sigma 0, trailing times end one step above it.
    settings = {"prediction_type": prediction, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    scheduler = diffusers.DDIMScheduler(**BETAS, **settings)
    found = moved(scheduler, 10)
    np.testing.assert_allclose(influence(scheduler, scheduler.timesteps), found, rtol=2e-3)


def test_flow_is_the_square_of_the_steps_in_sigma():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    squares = np.diff(scheduler.sigmas.numpy()) ** 2
    np.testing.assert_allclose(influence(scheduler, scheduler.timesteps), squares / squares.mean(), rtol=1e-4)


def test_much_noise_counts_more_for_epsilon():
    scheduler = diffusers.DDIMScheduler(**BETAS)
    scheduler.set_timesteps(20)
    weights = influence(scheduler, scheduler.timesteps)
    assert (np.diff(weights[:15]) < 0).all()
    assert weights.mean() == pytest.approx(1)


def test_trajectories_of_another_kind_weigh_all_alike():
    assert (influence(diffusers.LCMScheduler(), [999, 759, 499]) == 1).all()
    assert (influence(diffusers.EDMEulerScheduler(), [1.0, 0.5]) == 1).all()
    assert (influence(diffusers.DDIMScheduler(), [981]) == 1).all()
    assert (influence(diffusers.DDIMScheduler(), [981, 981, 481]) == 1).all()
