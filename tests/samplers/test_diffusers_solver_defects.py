"""Where a solver of Diffusers 0.42.1 is not that of its paper: one test a defect, theirs shown, ours right."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffaccel import DPMSinglestepScheduler, SolverScheduler
from diffaccel.samplers.exponential import ExponentialAdams
from tests.samplers.analytic import place
from tests.samplers.levels import nodes

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_sde_third_order_weight_has_its_sign() -> None:
    """`sde-dpmsolver++` of order 3 has - 1/2 for + 1/2: the weight of the curvature tends to -1, not to 0."""
    h = 0.05
    at = nodes("vp", [-2 * h, -h, 0.0, h])
    stock = diffusers.DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++", solver_order=3)
    stock.set_timesteps(4)
    stock.sigmas = torch.tensor([n.ve_sigma for n in at], dtype=torch.float64)
    stock._step_index = 2
    parabola = [torch.tensor([(n.lam / h) ** 2], dtype=torch.float64) for n in at[:3]]
    zero = torch.zeros(1, dtype=torch.float64)
    theirs = stock.multistep_dpm_solver_third_order_update(parabola, sample=zero, noise=zero)
    row = ExponentialAdams(3, eta=1.0).predict(at[3], at[2::-1], 3)
    ours = at[3].alpha * sum(w * float(m) for w, m in zip(row.m, parabola[::-1], strict=True))
    u = np.linspace(0, h, 20001)
    kernel = 2 * np.exp(-2 * (h - u)) * (u / h) ** 2
    exact = at[3].alpha * float(((kernel[1:] + kernel[:-1]) / 2).sum() * (u[1] - u[0]))
    assert ours == pytest.approx(exact, rel=1e-6)
    assert float(theirs) < -0.6


@pytest.mark.parametrize("steps", [2, 10])
def test_first_step_from_pure_noise_uses_the_network(steps: int) -> None:
    """IPNDM starts where alpha is 0 and divides 0 by 1e-8: whatever its network says there, the first x0 is 0."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    stock = diffusers.IPNDMScheduler()
    moved = []
    for answer in (-X0, X0):  # v at pure noise is -x0
        stock.set_timesteps(steps)
        moved.append(stock.step(answer, stock.timesteps[0], noise).prev_sample)
    assert torch.equal(*moved)
    ours = SolverScheduler(
        **SD,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        solver_options={"solver": "ipndm"},
    )
    ours.set_timesteps(steps)
    out = ours.step(-X0, ours.timesteps[0], noise)
    assert out.pred_original_sample is not None
    torch.testing.assert_close(out.pred_original_sample, X0, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_churned_sample_is_what_the_network_sees(name: str) -> None:
    """With `s_churn` the sample gets its noise after the network has seen it: for a network that knows the one picture
    there is, x0 comes out with that noise in it. Ours has the raised levels on the grid."""
    torch.manual_seed(0)
    stock = getattr(diffusers, name)(**(SD if name == "EulerDiscreteScheduler" else {}))
    stock.set_timesteps(10)
    ours = SolverScheduler.from_config(stock.config, solver_options={"solver": "edm_stochastic", "s_tmin": 0.0})
    ours.set_timesteps(19)
    i, t = 4, stock.timesteps[4]
    sigma = float(stock.sigmas[i])
    x = X0 + sigma * torch.randn(X0.shape)
    out = (x - X0) / sigma if name == "EulerDiscreteScheduler" else edm_output(x, X0, sigma, ours)
    stock.scale_model_input(x, t)
    theirs = stock.step(out, t, x, s_churn=40.0, s_tmin=0.0)
    assert (theirs.pred_original_sample - X0).abs().max() > 0.1
    assert (run_knowing(ours) - X0).abs().max() < 1e-4


def edm_output(x: Tensor, x0: Tensor, sigma: float, scheduler: SolverScheduler) -> Tensor:
    """What an EDM network that knows x0 says."""
    p, q = scheduler._x0_of(-float(np.log(sigma)))
    return (x0 - p * x) / q


def run_knowing(scheduler: SolverScheduler) -> Tensor:
    """End of a run for a network that knows the picture, after checking every x0 on the way."""
    generator = torch.Generator().manual_seed(3)
    lam = scheduler.grid.lambdas
    alpha, sigma = scheduler.schedule.alpha_sigma(lam[0])
    x = alpha * X0 + sigma * torch.randn(X0.shape, generator=generator)
    for level, t in zip(lam, scheduler.timesteps, strict=False):
        p, q = scheduler._x0_of(level)
        out = scheduler.step((X0 - p * x) / q, t, x, generator)
        assert out.pred_original_sample is not None
        torch.testing.assert_close(out.pred_original_sample, X0, atol=1e-3, rtol=0)
        x = out.prev_sample
    return x


def test_singlestep_sde_noise_belongs_to_one_path() -> None:
    """Each stage of `sde-dpmsolver++` starts over from the step's first sample with a noise of its own: the stage that
    the network sees and the end of the step have independent noises. Ours is one path; see the covariance test."""
    lam = np.linspace(-1.0, 1.0, 3)
    stock = diffusers.DPMSolverSinglestepScheduler(**SD, algorithm_type="sde-dpmsolver++", solver_order=2)
    ours = DPMSinglestepScheduler.from_config(stock.config)
    place(ours, lam[[0, 2]])
    stock.set_timesteps(3)
    stock.sigmas = torch.tensor([*np.exp(-lam), 0.0])
    zero, correlations = torch.zeros(1, 4, 100, 100), []
    for scheduler in (stock, ours):
        generator, states, x = torch.Generator().manual_seed(4), [], zero
        for i in range(2):
            level = -float(np.log(float(stock.sigmas[i])))
            p, q = ours._x0_of(level)
            x = scheduler.step(-p / q * x, scheduler.timesteps[i], x, generator=generator).prev_sample  # x0 = 0
            states.append(x.flatten().numpy())
        correlations.append(float(np.corrcoef(states)[0, 1]))
    h = 1.0  # half of the step: OU with eta = 1 decays by exp(-2 h)
    expected = np.exp(-2 * h) * np.exp(h) * np.sqrt(-np.expm1(-2 * h) / -np.expm1(-4 * h))
    assert abs(correlations[0]) < 0.05
    assert correlations[1] == pytest.approx(expected, abs=0.02)
