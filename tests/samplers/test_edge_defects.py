"""What failed once, found by trying to break the samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import diffaccel
from diffaccel.samplers.catalog import SOLVERS
from tests import tiny
from tests.samplers.point_mass import EPS, X0, at_level, level, samples
from tests.samplers.test_edge_options import ON_EPS, STAGED, check, make

SEVERAL_CALLS = [name for name, stages in STAGED.items() if stages > 1]


@pytest.mark.parametrize("solver", ["dpm_2m_sde", "dpm_3m_sde"])
def test_dual_fast_is_refused_where_predictions_are_of_different_noise(solver: str) -> None:
    """The step to zero mixed eps of different noise, which then stayed in the picture."""
    with pytest.raises(ValueError, match="use a solver without noise, or on x0"):
        make(solver, dual_fast=0.5)


@pytest.mark.parametrize("network", ["flow", "zero_snr_v"])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        *((name, {"start": "singlestep"}) for name in ON_EPS if not SOLVERS[name].stochastic),
        ("unipc", {"prediction": "epsilon"}),
        ("unipc_3", {"prediction": "epsilon"}),
    ],
    ids=str,
)
def test_first_interval_of_eps_is_not_corrected_from_pure_noise(
    solver: str, options: dict[str, Any], network: str
) -> None:
    """As ExponentialRungeKutta has one stage there: eps of pure noise says nothing, and its weight is sigma / alpha."""
    scheduler = make(solver, network, **options)
    scheduler.set_timesteps(8)
    layout = scheduler._layout
    assert np.abs(scheduler._rows[:, layout.correct.start : layout.noise]).sum(1).max() < 30


@pytest.mark.parametrize("solver", STAGED)
def test_given_timesteps_of_flow_models(solver: str) -> None:
    scheduler = make(solver, "flow")
    scheduler.set_timesteps(timesteps=[900.0, 700.5, 400.0, 32.0])
    check(scheduler, 4)


@pytest.mark.parametrize("solver", SEVERAL_CALLS)
def test_more_calls_than_timesteps_are_refused(solver: str) -> None:
    with pytest.raises(ValueError, match="between 1 and the 1000 training timesteps, not 1001"):
        make(solver).set_timesteps(1001)


@pytest.mark.parametrize("solver", ["dpmpp_2s", "dpm_3s", "deis_rho3kutta", "deis_rho4rk", "edm_stochastic", "seeds_3"])
def test_integer_clock_rounds_stages_too(solver: str) -> None:
    scheduler = make(solver, timesteps="integer")
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.dtype == torch.int64
    assert torch.equal(scheduler.timesteps, scheduler.timesteps.round())


@pytest.mark.parametrize("schedule", ["normal", "ddim_uniform"])
def test_flow_networks_are_called_at_trained_noise(schedule: str) -> None:
    """The table of a flow path begins at sigma = 0, and spacings that end at its first entry call the network there."""
    scheduler = make("dpmpp_3m", "flow", schedule=schedule)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[-1] >= 0.5
    weights = scheduler._rows[:, scheduler._layout.predict]
    assert np.abs(weights).sum(1).max() < 100


@pytest.mark.parametrize("network", ["flow", "zero_snr_v", "epsilon"])
@pytest.mark.parametrize("solver", ["dpm_2m_sde", "dpm_3m_sde"])
def test_sde_on_eps_leaves_pure_noise_behind(solver: str, network: str) -> None:
    """Frozen eps keeps its noise over a step: 1e9 on flow paths. Later steps add up too, by the method as printed."""
    scheduler = make(solver, network)
    scheduler.set_timesteps(8)
    seen = samples(scheduler, at_level(scheduler, 0), torch.Generator().manual_seed(0))
    alpha, sigma = level(scheduler, 1)
    assert (seen[1] - alpha * X0).norm() < 4 * sigma * EPS.norm()


@pytest.mark.parametrize("solver", ["dpm_2m", "dpm_2m_sde"])
def test_portable_save_of_dpm_solver(tmp_path: Path, solver: str) -> None:
    pipe, _ = tiny.dit()
    pipe.scheduler = diffaccel.scheduler(solver, pipe)
    diffaccel.save_pretrained(pipe, tmp_path / "out")


@pytest.mark.parametrize(("solver", "name"), [("heun", "HeunDiscreteScheduler"), ("ddpm", "DDPMScheduler")])
def test_clip_sample_of_the_class_that_is_replaced(solver: str, name: str) -> None:
    scheduler = diffaccel.scheduler(solver, getattr(diffusers, name)(clip_sample=True).config)
    scheduler.set_timesteps(4)
    x = 5 * tiny.noise(1, 3, 4, 4)
    made: Any = scheduler.step(-x, scheduler.timesteps[0], x, torch.Generator().manual_seed(0))
    assert made.pred_original_sample.abs().max() <= 1
