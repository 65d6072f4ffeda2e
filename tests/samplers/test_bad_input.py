"""Misuse: one sentence that says what was wrong and what is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import diffaccel
from diffaccel import DDIMSolverScheduler, DPMSolverScheduler, FlowEulerScheduler, SolverScheduler, UniPCScheduler
from tests import tiny
from tests.tiny import noise

NAN, INF = float("nan"), float("inf")
CLASSES = [SolverScheduler, DDIMSolverScheduler, DPMSolverScheduler, UniPCScheduler, FlowEulerScheduler]


def refused(call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...] = ValueError) -> str:
    """Message of the error that `call` raises, once it is seen to be one sentence."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert len(message.split()) >= 5, message
    assert "\n" not in message, message
    assert not re.search(r"\. [A-Z]|\.$", message), f"more than one sentence: {message}"
    return message


def _config() -> dict[str, Any]:
    return dict(diffusers.DDIMScheduler(**tiny.SD_BETAS).config)


@pytest.mark.parametrize("name", ["runge", "", "dpm++ 4m", "DPM++ 2M Turbo", "dpmpp_2m karras karras"])
def test_unknown_solver_names_those_known(name: str) -> None:
    for call in (
        lambda: diffaccel.scheduler(name, _config()),
        lambda: SolverScheduler(solver_options={"solver": name}) if name else diffaccel.scheduler(name, _config()),
    ):
        message = refused(call)
        assert f"unknown solver {name!r}" in message
        assert "dpmpp_2m" in message


@pytest.mark.parametrize("name", ["ays", "", "cubic"])
def test_unknown_schedule_names_those_known(name: str) -> None:
    message = refused(lambda: diffaccel.scheduler("dpmpp_2m", _config(), schedule=name))
    assert f"unknown schedule {name!r}" in message
    assert "karras" in message
    for config in ({"timestep_spacing": name}, {"solver_options": {"schedule": name}}):
        message = refused(lambda config=config: DPMSolverScheduler(**config).set_timesteps(5))
        assert f"unknown schedule {name!r}" in message


def test_names_must_be_strings() -> None:
    for call in (
        lambda: diffaccel.scheduler(None, _config()),
        lambda: diffaccel.scheduler(2, _config()),
        lambda: diffaccel.scheduler("ddim", _config(), schedule=3),
    ):
        assert "unknown" in refused(call, (TypeError, ValueError))


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("prediction_type", "noise", "epsilon"),
        ("beta_schedule", "quadratic", "scaled_linear"),
        ("final_sigmas_type", "one", "sigma_min"),
        ("algorithm_type", "dpmsolver+++", "sde-dpmsolver++"),
        ("solver_type", "rk4", "bh2"),
        ("solver_order", 5, "1, 2, 3"),
        ("solver_order", 0, "1, 2, 3"),
        ("solver_options", {"timesteps": "rounded"}, "integer"),
        ("solver_options", {"start": "heun"}, "singlestep"),
        ("solver_options", {"second": "heun"}, "midpoint"),
        ("solver_options", {"eta": -1.0}, "0 (the ODE) or more"),
        ("solver_options", {"eta": NAN}, "0 (the ODE) or more"),
        ("solver_options", {"order": 7}, "1, 2, 3"),
        ("solver_options", {"tau": 1.0}, "halve_curvature"),
        ("solver_options", {"solver": "unipc"}, "SolverScheduler"),
        ("solver_options", {"prediction": "v"}, "x0 or epsilon"),
        ("solver_options", {"eta": "1"}, "must be a number, not '1'"),
        ("solver_options", {"eta": None}, "must be a number, not None"),
        ("solver_options", {"order": 2.5}, "must be a whole number, not 2.5"),
        ("solver_options", {"order": True}, "must be a whole number, not True"),
        ("solver_options", {"corrector": "yes"}, "must be True or False"),
        ("solver_options", {"dual_fast": True}, "must be a number, not True"),
        ("solver_options", {"strength": True}, "between 0"),
        ("solver_options", {"solver": "heun", "tableau": ["a"]}, "must be a name"),
        ("solver_order", 2.0, "1, 2, 3 or 4, not 2.0"),
        ("solver_options", {"dual_fast": -1.0}, "0 (off) or more"),
        ("solver_options", {"strength": 1.5}, "between 0"),
        ("solver_options", {"solver": "heun", "dual_fast": 0.5}, "multistep"),
        ("solver_options", {"solver": "heun", "tableau": "rk5"}, "kutta3"),
        ("solver_options", {"solver": "heun", "s_churn": -1.0}, "0 or more"),
        ("solver_options", {"solver": "er_sde_3", "order": 4}, "1, 2 or 3"),
        ("solver_options", {"solver": "er_sde_3", "noise_scale": "sde_9"}, "sde_5"),
        ("solver_options", {"solver": "gradient_estimation", "gamma": 0.5}, "1 (DDIM) or more"),
        ("solver_options", {"solver": "gradient_estimation", "mu": 1.0}, "between 0"),
        ("solver_options", {"solver": "deis_tab2", "variable": "log"}, "sigma, time, alpha_bar"),
        ("solver_options", {"solver": "deis_tab2", "order": 5}, "1, 2, 3 or 4"),
        ("solver_options", {"solver": "ipndm", "corrector": True}, "no corrector"),
        ("solver_options", {"solver": "dpmpp_2s", "stages": 4}, "2 or 3"),
        ("solver_options", {"solver": "dpmpp_2s", "eta": 1.0, "ancestral": 1.0}, "only one of them"),
        ("trained_betas", [0.1, 0.0, 0.2], "betas"),
        ("trained_betas", [0.1, 1.5, 0.2], "betas"),
    ],
)
def test_unknown_value_names_those_accepted(key: str, value: Any, accepted: str) -> None:
    cls = SolverScheduler if isinstance(value, dict) and len(value) > 1 else DPMSolverScheduler
    assert accepted in refused(lambda: cls(**{key: value}).set_timesteps(2))


def test_singlestep_start_needs_a_deterministic_solver() -> None:
    options = {"start": "singlestep", "eta": 1.0}
    message = refused(lambda: DPMSolverScheduler(solver_options=options).set_timesteps(5))
    assert "deterministic" in message


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None, "10"])
def test_number_of_steps_is_checked(cls: Any, steps: Any) -> None:
    message = refused(lambda: cls().set_timesteps(steps))
    assert repr(steps) in message
    if type(steps) is int:
        assert "between 1 and" in message
        assert "1000 training timesteps" in message


@pytest.mark.parametrize(
    "sigmas",
    [[1.0, 2.0, 0.1], [2.0, 2.0, 0.1], [0.1, 2.0], [], [0.0], [2.0, -1.0], [NAN, 1.0], [INF, 1.0], [[3.0, 1.0]], "abc"],
    ids=str,
)
def test_sigmas_must_fall(sigmas: Any) -> None:
    assert "sigmas must be a list of positive numbers" in refused(
        lambda: DPMSolverScheduler().set_timesteps(sigmas=sigmas)
    )


def test_sigmas_of_flow_models_end_at_one() -> None:
    assert "between 0 and 1" in refused(lambda: FlowEulerScheduler().set_timesteps(sigmas=[14.6, 1.0]))


@pytest.mark.parametrize(
    "timesteps", [[1, 2, 3], [5, 5, 1], [], [NAN, 1], [1200, 5], [7, -1], [[9, 5], [3, 1]], "abc"], ids=str
)
def test_timesteps_must_fall_within_the_trained_range(timesteps: Any) -> None:
    assert "timesteps must" in refused(lambda: DPMSolverScheduler().set_timesteps(timesteps=timesteps))


def test_timesteps_beside_sigmas_are_checked_too() -> None:
    scheduler = DPMSolverScheduler()
    assert "2 timesteps were given for 3 sigmas" in refused(
        lambda: scheduler.set_timesteps(timesteps=[900, 500], sigmas=[9.0, 3.0, 1.0])
    )
    for told in ([900, NAN], [500, 900]):
        refused(lambda told=told: scheduler.set_timesteps(timesteps=told, sigmas=[9.0, 3.0]))
    assert "num_inference_steps is 3" in refused(lambda: scheduler.set_timesteps(3, sigmas=[9.0, 3.0]))


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_shift_must_be_positive(shift: float) -> None:
    assert "shift" in refused(lambda: FlowEulerScheduler(shift=shift).set_timesteps(5))


def test_dynamic_shift_needs_mu() -> None:
    assert "pass mu" in refused(lambda: FlowEulerScheduler(use_dynamic_shifting=True).set_timesteps(5))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_model_output_must_be_finite(value: float, dtype: torch.dtype) -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(4)
    output = noise(1, 4, 8, 8).to(dtype)
    x = scheduler.step(output, scheduler.timesteps[0], output).prev_sample
    output[0, 1, 2, 3] = value
    message = refused(lambda: scheduler.step(output, scheduler.timesteps[1], x))
    assert "model output at step 2 of 4 is not finite" in message


def test_largest_float16_output_is_finite() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(4)
    output = torch.full((4, 4, 32, 32), 65504.0, dtype=torch.float16)
    assert scheduler.step(output, scheduler.timesteps[0], output.float(), return_dict=False)[0].shape == output.shape


NOT_CONFIGS: dict[str, Callable[[], Any]] = {
    "network": lambda: tiny.sd()[0].unet.config,
    "lcm": lambda: diffusers.LCMScheduler().config,
    "tcd": lambda: diffusers.TCDScheduler().config,
    "cogvideox": lambda: diffusers.CogVideoXDPMScheduler().config,
    "empty": dict,
    "no keys of ours": lambda: {"a": 1},
    "none": lambda: None,
    "string": lambda: "runwayml/stable-diffusion-v1-5",
    "list": lambda: ["DDIMScheduler"],
    "scheduler": diffusers.DDIMScheduler,
}


@pytest.mark.parametrize("kind", NOT_CONFIGS)
def test_only_configs_of_schedulers_are_taken(kind: str) -> None:
    given = NOT_CONFIGS[kind]()
    for call in (*(lambda cls=cls: cls.from_config(given) for cls in CLASSES), lambda: _by_name(given)):
        message = refused(call, (TypeError, ValueError))
        assert re.search("config", message)


def _by_name(given: Any) -> SolverScheduler:
    return diffaccel.scheduler("dpmpp_2m", given)


def _ready(cls: Any = DPMSolverScheduler, steps: int = 4) -> SolverScheduler:
    scheduler = cls()
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("cls", CLASSES)
def test_step_needs_set_timesteps(cls: Any) -> None:
    x = noise(1, 4, 2, 2)
    assert "call scheduler.set_timesteps(n) first" in refused(lambda: cls().step(x, 999, x))


@pytest.mark.parametrize("cls", CLASSES)
def test_step_is_made_once_in_order_and_not_after_the_end(cls: Any) -> None:
    scheduler, x = _ready(cls), noise(1, 4, 2, 2)
    t = scheduler.timesteps
    scheduler.step(x, t[0], x)
    for again in (t[0], t[0].clone(), float(t[0])):
        message = refused(lambda again=again: scheduler.step(x, again, x))
        assert "step 2 of 4 is" in message
        assert f"{float(t[1]):g}" in message
    assert "in order" in refused(lambda: scheduler.step(x, t[2], x))
    for i in (1, 2, 3):  # a refused call has changed nothing
        assert scheduler.step_index == i
        scheduler.step(x, t[i], x)
    assert "after the last of 4 steps" in refused(lambda: scheduler.step(x, t[3], x))


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_begin_index_lies_within_the_run(index: int) -> None:
    assert "begin_index must lie between 0 and 3" in refused(lambda: _ready().set_begin_index(index))


def test_noise_schedule_of_another_path_is_refused() -> None:
    assert "for flow-matching models" in refused(
        lambda: DPMSolverScheduler(solver_options={"schedule": "flow"}).set_timesteps(5)
    )


def test_integer_clock_says_when_levels_repeat() -> None:
    scheduler = DPMSolverScheduler(use_beta_sigmas=True, solver_options={"timesteps": "integer"})
    assert "use timesteps='float'" in refused(lambda: scheduler.set_timesteps(900))


def test_a_timestep_off_the_grid_is_refused() -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(4)
    x = noise(1, 4, 2, 2)
    assert "no step is made at timestep 12345" in refused(lambda: scheduler.step(x, 12345, x))


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (3, 8, 2, 2), (3, 4, 2)])
def test_model_output_must_have_the_shape_of_the_sample(shape: tuple[int, ...]) -> None:
    scheduler = DPMSolverScheduler()
    scheduler.set_timesteps(4)
    x = noise(3, 4, 2, 2)
    message = refused(lambda: scheduler.step(torch.zeros(shape), scheduler.timesteps[0], x))
    assert "must have one shape" in message


def test_unipc_without_its_corrector_is_refused() -> None:
    config = diffusers.UniPCMultistepScheduler(disable_corrector=[0]).config
    assert "leave disable_corrector out" in refused(lambda: UniPCScheduler.from_config(config))
