"""What is left of the network's output before it counts: x0 clamped, memory to match, learned variance cut off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffaccel
from diffaccel import DDIMSolverScheduler
from diffaccel.samplers.catalog import SOLVERS
from diffaccel.samplers.scheduler import SolverSchedulerOutput
from tests.samplers.point_mass import NETWORKS, level
from tests.tiny import noise

EVERY = pytest.mark.parametrize("solver", SOLVERS)


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize("keys", [{"thresholding": True}, {"thresholding": True, "sample_max_value": 2.0}], ids=str)
@pytest.mark.parametrize("network", ["epsilon", "flow"])
@EVERY
def test_memory_holds_what_belongs_to_the_filtered_x0(solver: str, network: str, keys: dict[str, Any]) -> None:
    """Of the clamped x0, not of the network's own words: eps = (x - alpha x0) / sigma, or its slope."""
    scheduler = diffaccel.scheduler(solver, NETWORKS[network], **keys)
    for n in (6, 7):
        scheduler.set_timesteps(n)
        x = 3 * noise(2, 3, 4, 4)
        for i, t in enumerate(scheduler.timesteps):
            seen = x
            output = 4 * torch.tanh(x)
            made = scheduler.step(output, t, x, seed(i))
            assert isinstance(made, SolverSchedulerOutput)
            x, x0 = made.prev_sample, made.pred_original_sample
            assert x0 is not None
            assert x0.abs().max() <= 1 + 1e-6
            alpha, sigma = level(scheduler, i)
            eps = (seen - alpha * x0) / sigma
            memory = {"x0": x0, "epsilon": eps, "slope": eps - x0 if network == "flow" else eps}
            assert scheduler._history is not None
            kept = scheduler._history[0]
            torch.testing.assert_close(kept, memory[scheduler.solver.memory], rtol=1e-3, atol=1e-3 + 1e-6 / sigma)


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
def test_clipped_samples_are_kept_clipped(prediction: str) -> None:
    options = {"prediction": prediction}
    scheduler = DDIMSolverScheduler(clip_sample=True, clip_sample_range=0.5, solver_options=options)
    scheduler.set_timesteps(5)
    x = 3 * noise(1, 2, 2, 2)
    for i, t in enumerate(scheduler.timesteps):
        seen = x
        made = scheduler.step(4 * torch.tanh(x), t, x)
        assert isinstance(made, SolverSchedulerOutput)
        x, x0 = made.prev_sample, made.pred_original_sample
        assert x0 is not None
        assert x0.abs().max() <= 0.5
        alpha, sigma = level(scheduler, i)
        assert scheduler._history is not None
        expected = x0 if prediction == "x0" else (seen - alpha * x0) / sigma
        torch.testing.assert_close(scheduler._history[0], expected, rtol=1e-4, atol=1e-4)
    assert x.abs().max() <= 0.5


@EVERY
def test_learned_variance_is_left_out(solver: str) -> None:
    config = NETWORKS["epsilon"]
    plain = diffaccel.scheduler(solver, config)
    learned = diffaccel.scheduler(solver, config, variance_type="learned_range")
    x = y = noise(2, 3, 4, 4)
    for scheduler in (plain, learned):
        scheduler.set_timesteps(6)
    for i, t in enumerate(plain.timesteps):
        output = 0.3 * torch.tanh(x) + 1e-4 * t
        x = plain.step(output, t, x, seed(i), return_dict=False)[0]
        y = learned.step(torch.cat([output, 100 + output], 1), learned.timesteps[i], y, seed(i), return_dict=False)[0]
    assert torch.equal(x, y)
