"""Where Diffusers 0.42.1 fails, ours runs: one test a defect, named after it.

D1 to D10 are numbers of a list kept while reading; each docstring says what Diffusers does.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffaccel import (
    DDIMSolverScheduler,
    DEISScheduler,
    DPMSolverScheduler,
    FlowEulerScheduler,
    SAScheduler,
    SolverScheduler,
    UniPCScheduler,
)
from tests import tiny
from tests.tiny import SD_BETAS, draw, noise, relative

COSINE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction"}
PATHS: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": SD_BETAS,
    "cosine": COSINE,
    "zero_snr": {**SD_BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "flow": {**FLOW, "shift": 3.0},
}
SPACINGS: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "logsnr": {"use_lu_lambdas": True},
}
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMSolverScheduler, {}),
    "dpm_1": (DPMSolverScheduler, {"solver_order": 1}),
    "dpm_2": (DPMSolverScheduler, {"solver_order": 2}),
    "dpm_2_heun": (DPMSolverScheduler, {"solver_order": 2, "solver_type": "heun"}),
    "dpm_3": (DPMSolverScheduler, {"solver_order": 3}),
    "sde_1": (DPMSolverScheduler, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    "sde_2": (DPMSolverScheduler, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
    "sde_3": (DPMSolverScheduler, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    "unipc_1": (UniPCScheduler, {"solver_order": 1}),
    "unipc_2": (UniPCScheduler, {"solver_order": 2}),
    "unipc_3": (UniPCScheduler, {"solver_order": 3}),
    "unipc_bh1": (UniPCScheduler, {"solver_order": 2, "solver_type": "bh1"}),
}
EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS)
X0, EPS = noise(1, 4, 4, 4, seed=1).double(), noise(1, 4, 4, 4, seed=2).double()


def _make(solver: str, **config: Any) -> SolverScheduler:
    cls, keys = SOLVERS[solver]
    return cls(**{**keys, **config})


def _run(scheduler: SolverScheduler) -> Tensor:
    """Sample at the end for a network that knows the one picture X0 there is; any sampler must then return it."""
    alpha, sigma = scheduler.schedule.alpha_sigma(scheduler.grid.lambdas[0])
    x = alpha * X0 + sigma * EPS
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler.schedule.alpha_sigma(scheduler.grid.lambdas[i])
        eps = (x - alpha * X0) / sigma
        out = {"epsilon": eps, "v_prediction": alpha * eps - sigma * X0, "flow_prediction": eps - X0}
        x = scheduler.step(out[scheduler.prediction_type], t, x, torch.Generator().manual_seed(i)).prev_sample
    return x


def _run_stock(scheduler: Any, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = EPS
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    return x


def _strictly_falls(values: Tensor) -> bool:
    return bool(values.isfinite().all() and (values.diff() < 0).all())


@EVERY_SOLVER
@pytest.mark.parametrize("steps", [32, 50, 1000])
def test_beta_sigmas_run_at_any_number_of_steps(solver: str, steps: int) -> None:
    """D1: from 32 steps on the first timesteps repeat (998, 998, 997 ...): IndexError or AssertionError."""
    scheduler = _make(solver, **SD_BETAS, use_beta_sigmas=True)
    scheduler.set_timesteps(steps)
    assert _strictly_falls(scheduler.timesteps)
    assert relative(_run(scheduler), X0) < 1e-5


@EVERY_SOLVER
@pytest.mark.parametrize("config", [{**SD_BETAS, "use_beta_sigmas": True}, {**COSINE, "use_karras_sigmas": True}])
def test_repeated_timesteps_do_not_break_a_pipeline(solver: str, config: dict[str, Any]) -> None:
    """D1 in a real pipeline, which does not call set_begin_index; with cosine betas and Karras too (issue 12771)."""
    assert draw(tiny.sd(), _make(solver, **config), 50).isfinite().all()


@EVERY_SOLVER
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("path", ["scaled_linear", "flow"])
def test_the_last_step_ends_on_the_clean_picture(path: str, spacing: str, solver: str) -> None:
    """D2: DEIS and SA-Solver append the last sigma once more, and so leave noise of 0.1 to 0.5 in the picture."""
    scheduler = _make(solver, **PATHS[path], **SPACINGS[spacing])
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[-1] == 0
    assert relative(_run(scheduler), X0) < 1e-6


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("path", PATHS)
def test_unipc_bh1_is_finite(path: str, final: str, order: int) -> None:
    """D3: B1(h) is infinite for the step to sigma = 0, and the picture NaN for every number of steps."""
    scheduler = UniPCScheduler(**PATHS[path], solver_type="bh1", solver_order=order, final_sigmas_type=final)
    for steps in (1, 2, 3, 8, 25):
        scheduler.set_timesteps(steps)
        assert _run(scheduler).isfinite().all()


@pytest.mark.parametrize("solver", ["dpm_2", "dpm_2_heun", "dpm_3", "sde_3", "unipc_2", "unipc_3", "unipc_bh1"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_high_order_at_the_end_is_finite(spacing: str, solver: str) -> None:
    """UniPC without lower_order_final and with sigma = 0: NaN (order 2), singular matrix (order 3)."""
    scheduler = _make(solver, **SD_BETAS, **SPACINGS[spacing], lower_order_final=False)
    for steps in (3, 5, 20):
        scheduler.set_timesteps(steps)
        assert relative(_run(scheduler), X0) < 1e-5


@EVERY_SOLVER
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("path", PATHS)
def test_sigma_min_spends_no_call_twice(path: str, spacing: str, solver: str) -> None:
    """DPM-Solver++ repeats the last sigma: order 3 and heun give NaN, order 2 wastes its last call."""
    scheduler = _make(solver, **PATHS[path], **SPACINGS[spacing], final_sigmas_type="sigma_min", set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    assert len(scheduler.timesteps) == 20
    assert _strictly_falls(scheduler.sigmas)
    assert relative(_run(scheduler), X0) < 0.05 + float(scheduler.sigmas[-1])


@EVERY_SOLVER
@pytest.mark.parametrize("keys", [{"shift": 3.0}, {"use_flow_sigmas": True, "flow_shift": 3.0}])
def test_mu_is_accepted_by_models_with_a_static_shift(solver: str, keys: dict[str, Any]) -> None:
    """D4: Flux-type pipelines always pass mu; AssertionError or TypeError in Diffusers (issue 9924)."""
    scheduler, without = _make(solver, **FLOW, **keys), _make(solver, **FLOW, **keys)
    scheduler.set_timesteps(8, mu=1.15)
    without.set_timesteps(8)
    assert torch.equal(scheduler.sigmas, without.sigmas)
    assert relative(_run(scheduler), X0) < 1e-6


@EVERY_SOLVER
@pytest.mark.parametrize("path", PATHS)
def test_timesteps_can_be_given(path: str, solver: str) -> None:
    """D5: TypeError with flow sigmas in DPM-Solver++, silently ignored by FlowMatchEuler (issue 14461)."""
    given = [900.0, 700.5, 400.0, 32.0]
    scheduler = _make(solver, **PATHS[path])
    scheduler.set_timesteps(timesteps=given)
    assert scheduler.timesteps.tolist() == given
    sigmas = scheduler.schedule.sigma_at(scheduler.schedule.lambda_at(np.array(given)))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*sigmas, 0.0], dtype=torch.float32))
    assert relative(_run(scheduler), X0) < 1e-6


@EVERY_SOLVER
@pytest.mark.parametrize("path", PATHS)
def test_sigmas_can_be_given(path: str, solver: str) -> None:
    """UniPC and DDIM take none, DPM-Solver++ none on flow paths, where the shift applies to them (issue 12108)."""
    given = np.array([0.98, 0.6, 0.31, 0.05])
    for last in ([], [0.0]):
        scheduler = _make(solver, **PATHS[path])
        scheduler.set_timesteps(sigmas=[*given, *last])
        expected = 3 * given / (1 + 2 * given) if path == "flow" else given
        torch.testing.assert_close(scheduler.sigmas, torch.tensor([*expected, 0.0], dtype=torch.float32))
        assert relative(_run(scheduler), X0) < 1e-6


@EVERY_SOLVER
def test_scale_noise_serves_flow_img2img(solver: str) -> None:
    """D6: DPM-Solver++, UniPC and DEIS lack it, and 22 pipelines call it."""
    pipe, _ = toy = tiny.sd3_img2img()
    scheduler = SOLVERS[solver][0].from_config(pipe.scheduler.config, **SOLVERS[solver][1])
    assert draw(toy, scheduler, 10).isfinite().all()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    t = scheduler.timesteps[4:5]
    expected = (1 - t / 1000) * X0 + t / 1000 * EPS
    torch.testing.assert_close(scheduler.scale_noise(X0, t, EPS), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cls", [SolverScheduler, DDIMSolverScheduler, DPMSolverScheduler, UniPCScheduler])
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("DEISMultistepScheduler", {}),
        ("SASolverScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_saved_config_of_one_solver_opens_in_another(tmp_path: Any, name: str, keys: dict[str, Any], cls: Any) -> None:
    """D7: a saved DEIS file is a ValueError in DPM-Solver++, an SDE one a NotImplementedError in DEIS."""
    getattr(diffusers, name)(**SD_BETAS, **keys).save_pretrained(tmp_path)
    scheduler = cls.from_pretrained(tmp_path)
    scheduler.set_timesteps(12)
    assert _run(scheduler).isfinite().all()


@EVERY_SOLVER
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("path", ["scaled_linear", "zero_snr", "flow"])
def test_as_few_and_as_many_steps_as_there_are(path: str, spacing: str, solver: str) -> None:
    """D8: NaN or IndexError at 1000 steps; D10: PNDM fails below 4."""
    scheduler = _make(solver, **PATHS[path], **SPACINGS[spacing])
    for steps in (1, 2, 3, 1000) if path != "zero_snr" else (1, 2, 3):
        scheduler.set_timesteps(steps)
        assert relative(_run(scheduler), X0) < 1e-5


@pytest.mark.parametrize("cls", [FlowEulerScheduler, DPMSolverScheduler, UniPCScheduler])
def test_mu_does_not_change_the_config(cls: Any) -> None:
    """D9: set_timesteps(mu=) overwrites config.flow_shift, but not what is saved."""
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler = cls.from_config(stock.config)
    before = copy.deepcopy(dict(scheduler.config))
    scheduler.set_timesteps(8, mu=0.8)
    assert dict(scheduler.config) == before
    assert scheduler.config.flow_shift == before["flow_shift"]


@EVERY_SOLVER
def test_flow_times_are_not_rounded(solver: str) -> None:
    """DPM-Solver++, UniPC and DEIS tell a flow network 999 for 999.67."""
    scheduler = _make(solver, **FLOW, use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_falls_strictly(spacing: str, path: str) -> None:
    """N from 1 to 1000 on the float clock: what the network is told and the noise levels, as it sees them."""
    for final in ("zero", "sigma_min"):
        scheduler = DPMSolverScheduler(**PATHS[path], **SPACINGS[spacing], final_sigmas_type=final)
        for steps in (*range(1, 61), 100, 250, 999, 1000):
            scheduler.set_timesteps(steps)
            assert len(scheduler.timesteps) == steps
            assert _strictly_falls(scheduler.timesteps), (steps, final)
            assert _strictly_falls(scheduler.sigmas), (steps, final)
            assert scheduler._table.isfinite().all(), (steps, final)


def test_sde_dpmsolver_of_order_3_has_no_rule_there() -> None:
    stock = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min"
    )
    with pytest.raises(UnboundLocalError):
        _run_stock(stock, 20)
    scheduler = DPMSolverScheduler.from_config(stock.config)
    scheduler.set_timesteps(20)
    assert _run(scheduler).isfinite().all()


@pytest.mark.parametrize("algorithm", ["dpmsolver", "sde-dpmsolver"])
def test_noise_prediction_forms_end_at_zero(algorithm: str) -> None:
    """There they insist on final_sigmas_type="sigma_min"."""
    with pytest.raises(ValueError, match="final_sigmas_type"):
        diffusers.DPMSolverMultistepScheduler(algorithm_type=algorithm)
    scheduler = DPMSolverScheduler(**SD_BETAS, algorithm_type=algorithm)
    scheduler.set_timesteps(8)
    assert relative(_run(scheduler), X0) < 1e-6


def test_unipc_in_noise_prediction_form_is_not_nan() -> None:
    """`predict_x0=False` gives NaN with sigma = 0 there."""
    stock = diffusers.UniPCMultistepScheduler(**SD_BETAS, predict_x0=False)
    assert not _run_stock(stock, 8).isfinite().all()
    scheduler = UniPCScheduler.from_config(stock.config)
    assert scheduler.solver.memory == "epsilon"
    scheduler.set_timesteps(8)
    assert relative(_run(scheduler), X0) < 1e-6


@pytest.mark.parametrize(
    ("name", "cls"), [("DEISMultistepScheduler", DEISScheduler), ("SASolverScheduler", SAScheduler)]
)
def test_last_step_of_deis_and_sa_on_karras_is_not_empty(name: str, cls: Any) -> None:
    """There the last sigma stands twice: the last call changes nothing, and noise of that sigma stays."""
    stock = getattr(diffusers, name)(**SD_BETAS, use_karras_sigmas=True)
    stock.set_timesteps(8)
    assert stock.sigmas[-1] == stock.sigmas[-2] > 0.02
    scheduler = cls.from_config(stock.config)
    scheduler.set_timesteps(8)
    assert scheduler.sigmas[-1] == 0
    assert relative(_run(scheduler), X0) < 1e-5
