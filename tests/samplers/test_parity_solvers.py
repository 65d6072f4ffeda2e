"""On the same levels, with the same network calls, each solver agrees with the Diffusers class that it replaces.

Not compared: PNDMScheduler (its first steps call the network twice, ours warms up as iPNDM) and DPMSolverSDEScheduler
(noise of a Brownian tree from torchsde).
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import diffaccel
from diffaccel import SolverScheduler
from tests.samplers.analytic import place
from tests.samplers.test_parity import network, relative_difference, sample

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
INTEGER = {"timesteps": "integer"}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}  # these are NaN in Diffusers where the run ends at sigma = 0
STEPS = pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])


@STEPS
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("algorithm", "order"),
    [("dpmsolver", 1), ("dpmsolver", 2), ("dpmsolver", 3), ("sde-dpmsolver", 1), ("sde-dpmsolver", 2)],
)
def test_dpm_solver_on_noise(algorithm, order, solver_type, spacing, steps):
    keys = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver_type, "timestep_spacing": spacing}
    stock = diffusers.DPMSolverMultistepScheduler(**SD, **keys, **TO_SIGMA_MIN)
    ours = diffaccel.DPMSolverScheduler.from_config(stock.config, solver_options=INTEGER)
    assert relative_difference(sample(ours, steps), sample(stock, steps)) < 1e-5


@STEPS
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_on_noise(order, solver_type, steps):
    keys = {"solver_order": order, "solver_type": solver_type, "predict_x0": False}
    stock = diffusers.UniPCMultistepScheduler(**SD, **keys, **TO_SIGMA_MIN)
    ours = diffaccel.UniPCScheduler.from_config(stock.config, solver_options={**INTEGER, "prediction": "epsilon"})
    assert relative_difference(sample(ours, steps), sample(stock, steps)) < 1e-5


@pytest.mark.parametrize("options", [{}, INTEGER], ids=["alone", "with other options"])
def test_predict_x0_false_is_adopted(options):
    """Options of the caller must not push out the one that the config asks for."""
    stock = diffusers.UniPCMultistepScheduler(**SD, predict_x0=False, **TO_SIGMA_MIN)
    keys = {"solver_options": options} if options else {}
    assert diffaccel.UniPCScheduler.from_config(stock.config, **keys).solver.memory == "epsilon"


@STEPS
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order, spacing, steps):
    """Diffusers ends at the least trained noise."""
    stock = diffusers.DEISMultistepScheduler(**SD, solver_order=order, timestep_spacing=spacing)
    ours = diffaccel.DEISScheduler.from_config(stock.config, solver_options=INTEGER, **TO_SIGMA_MIN)
    assert relative_difference(sample(ours, steps), sample(stock, steps)) < 1e-5


@STEPS
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("predictor", [1, 2, 3])
def test_sa_solver(predictor, tau, steps):
    """`corrector_order` counts the new point: one more than the predictor's. Two points are UniPC's B1(h) there."""
    stock = diffusers.SASolverScheduler(
        **SD, predictor_order=predictor, corrector_order=predictor + 1, tau_func=lambda t: torch.tensor(tau)
    )
    options = {"solver": "sa_solver", "order": predictor, "second": "bh1", "eta": tau**2, **INTEGER}
    options |= {"noise_start": 1.0, "noise_end": 0.0}
    config = {k: v for k, v in stock.config.items() if k != "tau_func"}
    ours = SolverScheduler.from_config(config, solver_options=options, **TO_SIGMA_MIN)
    difference = relative_difference(noisy_sample(ours, steps), noisy_sample(stock, steps))
    assert difference < (1e-5 if predictor < 3 else 1e-4)  # its integrals cancel in float32


@STEPS
def test_sa_solver_draws_noise_where_diffusers_does(steps):
    """Its default: tau = 1 from t = 200 to 800; ours by the share of the time, 199.8 to 799.2."""
    stock = diffusers.SASolverScheduler(**SD, predictor_order=2, corrector_order=3)
    options = {"solver": "sa_solver", "order": 2, "second": "bh1", **INTEGER}
    ours = SolverScheduler.from_config(stock.config, solver_options=options, **TO_SIGMA_MIN)
    assert relative_difference(noisy_sample(ours, steps), noisy_sample(stock, steps)) < 1e-5


def noisy_sample(scheduler: Any, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator, return_dict=False)[0]
    return x


def both(stock: Any, ours: SolverScheduler, generator_too: bool = False) -> tuple[Tensor, Tensor]:
    """Results of a class of Diffusers whose sample is x / alpha, and of ours, for a network told the former's times."""
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = []
    for scheduler, scale in ((stock, float(stock.sigmas[0] ** 2 + 1) ** 0.5), (ours, 1.0)):
        x, noise = start * scale, {"generator": torch.Generator().manual_seed(1)} if generator_too else {}
        assert len(scheduler.timesteps) == len(stock.timesteps)
        for t, told in zip(scheduler.timesteps, stock.timesteps, strict=True):
            assert abs(float(t) - float(told)) < 1
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(network(seen, told), t, x, return_dict=False, **noise)[0]
        out.append(x)
    return out[0], out[1]


def levels(stock: Any) -> list[float]:
    """The distinct sigmas of a class of Diffusers, which repeats them for its stages, without the last, 0."""
    return sorted({float(s) for s in stock.sigmas} - {0.0}, reverse=True)


K_DIFFUSION = {
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm_2s",
    "LMSDiscreteScheduler": "deis_rhoab3",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
}
SPACINGS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"timestep_spacing": "trailing"})


@pytest.mark.parametrize("steps", [2, 5, 10, 20])
@pytest.mark.parametrize("keys", SPACINGS, ids=lambda keys: "".join(keys))
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", K_DIFFUSION)
def test_k_diffusion_s_samplers(name, prediction, keys, steps):
    if name == "EulerAncestralDiscreteScheduler" and any(key.startswith("use_") for key in keys):
        pytest.skip("has no such option")
    stock = getattr(diffusers, name)(**SD, prediction_type=prediction, **keys)
    stock.set_timesteps(steps)
    ours = SolverScheduler.from_config(stock.config, solver_options={"solver": K_DIFFUSION[name]})
    ours.set_timesteps(sigmas=levels(stock))
    theirs, result = both(stock, ours, generator_too="Ancestral" in name)
    assert relative_difference(result, theirs) < 1e-5


@pytest.mark.parametrize("steps", [2, 5, 10])
@pytest.mark.parametrize("keys", SPACINGS, ids=lambda keys: "".join(keys))
def test_dpm_2_ancestral(keys, steps, monkeypatch):
    """Given the noises: theirs draws one a step, ours one a call, of which that of the last call of a step counts."""
    noises = torch.randn(steps, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs, ours_ = iter(noises), iter(noises.repeat_interleave(2, dim=0))
    module = "diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: next(theirs))
    monkeypatch.setattr("diffaccel.samplers.scheduler.randn_tensor", lambda *_, **__: next(ours_))
    stock = diffusers.KDPM2AncestralDiscreteScheduler(**SD, **keys)
    stock.set_timesteps(steps)
    ours = SolverScheduler.from_config(stock.config, solver_options={"solver": "dpm_2s_ancestral"})
    ours.set_timesteps(sigmas=levels(stock))
    expected, result = both(stock, ours)
    assert relative_difference(result, expected) < 2e-5  # a difference of large numbers at 2 steps


def test_heun_scheduler_makes_their_n_steps_in_2n_minus_1_calls():
    stock = diffusers.HeunDiscreteScheduler(**SD, use_karras_sigmas=True)
    stock.set_timesteps(10)
    ours = diffaccel.HeunScheduler.from_config(stock.config)
    ours.set_timesteps(19)
    assert len(stock.timesteps) == len(ours.timesteps) == 19
    theirs, result = both(stock, ours)
    assert relative_difference(result, theirs) < 1e-5


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("calls", [3, 9, 15])
def test_singlestep_of_two_stages_on_even_log_snr(calls, solver_type, algorithm):
    """There the nodes that Diffusers uses for stages are at half of a step. Until the last call: it is NaN on noise."""
    theirs, result = singlestep(calls, {"solver_order": 2, "algorithm_type": algorithm, "solver_type": solver_type})
    assert relative_difference(result, theirs) < 1e-5


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("calls", [4, 10, 16])
def test_singlestep_of_three_stages_on_even_log_snr(calls, algorithm):
    """Its inner stage has the weights of `solver_type`, where the papers' algorithm 5 has exact ones: give it those."""
    theirs, result = singlestep(calls, {"solver_order": 3, "algorithm_type": algorithm})
    assert relative_difference(result, theirs) < 1e-5


def singlestep(calls: int, keys: dict[str, Any]) -> tuple[Tensor, Tensor]:
    final = TO_SIGMA_MIN if keys["algorithm_type"] == "dpmsolver" else {}
    stock = diffusers.DPMSolverSinglestepScheduler(**SD, **keys, **final)
    stock.set_timesteps(calls)
    lam = np.linspace(-np.log(12.0), -np.log(0.05), calls)
    stock.sigmas = torch.tensor([*np.exp(-lam), 0.01 if final else 0.0], dtype=torch.float64)
    if final:
        stock.order_list[-1] = 1
    ours = diffaccel.DPMSinglestepScheduler.from_config(stock.config)
    place(ours, lam[:: keys["solver_order"]])
    assert len(ours.timesteps) == calls
    x = y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, (t, s) in enumerate(zip(stock.timesteps, ours.timesteps, strict=True)):
        if keys["solver_order"] == 3:
            stock.register_to_config(solver_type="heun" if stock.order_list[i] == 2 else "midpoint")
        if i == calls - 1 and final:
            break
        x = stock.step(network(x, s), t, x).prev_sample
        y = ours.step(network(y, s), s, y).prev_sample
    return x, y


def test_singlestep_ends_on_x0_as_theirs_does():
    """The last step of their data-prediction form, the only one that can end at sigma = 0, and of ours."""
    theirs, result = singlestep(5, {"solver_order": 2, "algorithm_type": "dpmsolver++"})
    assert relative_difference(result, theirs) < 1e-5


@STEPS
@pytest.mark.parametrize("points", ["shallow", "deep"])
def test_ipndm(points, steps):
    """On a cosine path of its own levels, to sigma = 0. It is told what `v_prediction` networks say."""
    angles = np.linspace(1.5 if points == "deep" else 1.2, 0.03, steps)
    stock = diffusers.IPNDMScheduler(trained_betas=[*np.sin(angles), 0.0])
    stock.set_timesteps(steps)
    ours = SolverScheduler(**SD, prediction_type="v_prediction", solver_options={"solver": "ipndm"})
    ours.set_timesteps(sigmas=np.tan(angles))
    x = y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, s in zip(stock.timesteps, ours.timesteps, strict=True):
        x = stock.step(network(x, s), t, x).prev_sample
        y = ours.step(network(y, s), s, y).prev_sample
    assert relative_difference(y, x) < 1e-5


@pytest.mark.parametrize("steps", [2, 5, 12, 20])
@pytest.mark.parametrize(
    ("solver", "keys"),
    [
        ("euler", {"solver_order": 1}),
        ("dpmpp_2m", {"solver_order": 2}),
        ("res_2m", {"solver_order": 2, "solver_type": "heun"}),
        ("dpmpp_3m_shipped", {"solver_order": 3}),
        ("dpmpp_2m_sde", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
        ("ddpm", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_edm_multistep(solver, keys, steps):
    stock = diffusers.EDMDPMSolverMultistepScheduler(**keys)
    ours = SolverScheduler.from_config(stock.config, solver_options={"solver": solver})
    assert relative_difference(sample(ours, steps), sample(stock, steps)) < 1e-5
