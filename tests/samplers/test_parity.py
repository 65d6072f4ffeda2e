"""On the same grid and clock we agree with Diffusers to 1e-5 (float32 sums in another order); see docs/parity.md."""

import diffusers
import numpy as np
import pytest
import torch

import diffaccel

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DPM, UNIPC, DDIM = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"

CASES = {
    "2M": (DPM, {}),
    "2M heun": (DPM, {"solver_type": "heun"}),
    "2M karras": (DPM, {"use_karras_sigmas": True}),
    "2M uniform log-SNR": (DPM, {"use_lu_lambdas": True}),
    "2M trailing": (DPM, {"timestep_spacing": "trailing"}),
    "2M leading": (DPM, {"timestep_spacing": "leading"}),
    "2M to sigma_min": (DPM, {"final_sigmas_type": "sigma_min"}),
    "2M linear betas": (DPM, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "2M cosine betas": (DPM, {"beta_schedule": "squaredcos_cap_v2"}),
    "2M clipped cosine betas": (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    "2M v, zero terminal SNR": (
        DPM,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "2M v": (DPM, {"prediction_type": "v_prediction"}),
    "2M x0": (DPM, {"prediction_type": "sample"}),
    "2M thresholding": (DPM, {"thresholding": True, "sample_max_value": 2.0}),
    "2M all orders to the end": (DPM, {"lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    "1": (DPM, {"solver_order": 1}),
    "3M": (DPM, {"solver_order": 3}),
    "SDE 1": (DPM, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    "SDE 2M": (DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "SDE 2M heun": (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "UniPC-1": (UNIPC, {"solver_order": 1}),
    "UniPC-2": (UNIPC, {"solver_order": 2}),
    "UniPC-3": (UNIPC, {"solver_order": 3}),
    "UniPC-3 karras": (UNIPC, {"solver_order": 3, "use_karras_sigmas": True}),
    "UniPC-2 bh1": (UNIPC, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    "DDIM": (DDIM, {"clip_sample": False}),
    "DDIM to sigma_min": (DDIM, {"clip_sample": False, "set_alpha_to_one": False}),
    "DDIM trailing": (DDIM, {"clip_sample": False, "timestep_spacing": "trailing"}),
}
OURS = {DPM: diffaccel.DPMSolverScheduler, UNIPC: diffaccel.UniPCScheduler, DDIM: diffaccel.DDIMSolverScheduler}


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth stand-in for a network: bounded, mixes neighbours, depends on the time it is told."""
    return torch.tanh(0.3 * x + torch.sin(torch.as_tensor(float(t)) / 100) * x.roll(1, -1))


def sample(scheduler, n=None, seed=0, **grid) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(n, **grid)
    x = torch.randn(2, 4, 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    noisy = {"generator": generator} if "sde" in scheduler.config.get("algorithm_type", "") else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, t), t, x, return_dict=False, **noisy)[0]
    return x


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("steps", [1, 5, 10, 20])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_diffusers(case, steps):
    name, keys = CASES[case]
    stock = getattr(diffusers, name)(**(VP | keys))
    ours = OURS[name].from_config(stock.config, solver_options={"timesteps": "integer"})
    assert relative_difference(sample(ours, steps), sample(stock, steps)) < 1e-5
    assert ours.timesteps.tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_ddim_clipping_agrees_where_the_clipped_x0_gives_the_noise(steps):
    """By default Diffusers keeps the noise of the unclipped x0, so that x0 and noise no longer make up the sample."""
    stock = diffusers.DDIMScheduler(clip_sample=True)
    ours = diffaccel.DDIMSolverScheduler.from_config(stock.config)
    x = y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    for t, s in zip(stock.timesteps, ours.timesteps, strict=True):
        x = stock.step(network(x, t), t, x, use_clipped_model_output=True).prev_sample
        y = ours.step(network(y, s), s, y).prev_sample
    assert relative_difference(y, x) < 1e-5


@pytest.mark.parametrize("steps", [5, 10, 28])
@pytest.mark.parametrize(
    "keys",
    [{}, {"shift": 3.0}, {"shift_terminal": 0.1}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}],
)
def test_flow_euler_agrees(keys, steps):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**keys)
    ours = diffaccel.FlowEulerScheduler.from_config(stock.config)
    assert relative_difference(sample(ours, steps), sample(stock, steps)) < 1e-5


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_agrees(kind):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    ours = diffaccel.FlowEulerScheduler.from_config(stock.config)
    sigmas = np.linspace(1, 1 / 10, 10)
    ours_sample, theirs = sample(ours, sigmas=sigmas, mu=0.8), sample(stock, sigmas=list(sigmas), mu=0.8)
    assert relative_difference(ours_sample, theirs) < 1e-5


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_agrees(prediction, schedule):
    stock = diffusers.EDMEulerScheduler(prediction_type=prediction, sigma_schedule=schedule)
    ours = diffaccel.SolverScheduler.from_config(stock.config, solver_options={"solver": "euler"})
    assert relative_difference(sample(ours, 12), sample(stock, 12)) < 1e-5


def test_edm_second_order_agrees():
    stock = diffusers.EDMDPMSolverMultistepScheduler()
    ours = diffaccel.SolverScheduler.from_config(stock.config, solver_options={"solver": "dpmpp_2m"})
    assert relative_difference(sample(ours, 12), sample(stock, 12)) < 1e-5


def test_unipc_on_flow_sigmas_agrees_when_the_clock_does():
    """UniPC truncates the times it tells on flow paths to integers; told the same ones, the pictures agree."""
    stock = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0, solver_order=2
    )
    ours = diffaccel.UniPCScheduler.from_config(stock.config)
    stock.set_timesteps(10)
    told = stock.timesteps.tolist()
    sigmas = np.linspace(1, 1 / 1000, 11)[:-1]
    sigmas[0] -= 1e-6  # its guard against log(0), at which we stop at 1e-9
    assert relative_difference(sample(ours, sigmas=sigmas, timesteps=told), sample(stock, 10)) < 1e-5


def test_svd_clock_agrees():
    stock = diffusers.EulerDiscreteScheduler(
        **{k: v for k, v in VP.items() if k != "steps_offset"},
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    ours = diffaccel.SolverScheduler.from_config(stock.config, solver_options={"solver": "euler"})
    assert relative_difference(sample(ours, 12), sample(stock, 12)) < 1e-5


@pytest.mark.parametrize("name", [DPM, UNIPC])
def test_half_precision_error_is_no_larger(name):
    stock = getattr(diffusers, name)(**VP)
    ours = OURS[name].from_config(stock.config, solver_options={"timesteps": "integer"})
    exact = sample(stock, 20)

    def half(scheduler):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 4, 8, 8, generator=generator).half()
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x.float(), t).half(), t, x, return_dict=False)[0]
        assert x.dtype == torch.float16
        return float((x.float() - exact).abs().max())

    assert half(ours) <= 1.5 * half(stock)
