"""The step that a policy reads off the scheduler is the one that the pipeline makes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial, wraps
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import diffaccel
from diffaccel.samplers.policy import Grid, Plan, attach
from diffaccel.samplers.policy.clock import Clock
from diffaccel.samplers.solvers import SOLVERS
from tests.policy import calls, denoiser, smaller, toy
from tests.tiny import SD_BETAS, draw

KARRAS: dict[str, Any] = {"use_karras_sigmas": True}
VP: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"),
        *("KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep"),
        *("UniPCMultistep", "DEISMultistep", "SASolver", "IPNDM", "LCM", "TCD", "PNDM"),
    )
} | {
    "PNDM, PLMS": ("PNDM", {"skip_prk_steps": True}),
    "DDIM, trailing": ("DDIM", {"timestep_spacing": "trailing"}),
    "Euler, Karras": ("EulerDiscrete", KARRAS),
    "Heun, Karras": ("HeunDiscrete", KARRAS),
    "KDPM2, Karras": ("KDPM2Discrete", KARRAS),
    "LMS, Karras": ("LMSDiscrete", KARRAS),
    "DPM++ 2M, Karras": ("DPMSolverMultistep", KARRAS),
    "DPM++ 2M SDE, Karras": ("DPMSolverMultistep", {**KARRAS, "algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 3, exponential": ("DPMSolverMultistep", {"use_exponential_sigmas": True, "solver_order": 3}),
    "UniPC, Karras": ("UniPCMultistep", KARRAS),
    "DPM, singlestep, Karras": ("DPMSolverSinglestep", KARRAS),
}
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")


def vp(name: str) -> Any:
    kind, config = VP[name]
    return getattr(diffusers, f"{kind}Scheduler")(**({} if kind == "IPNDM" else SD_BETAS), **config)


class Names:
    """Each step its own name."""

    def plan(self, grid: Grid, conditioning: Mapping[str, Any]) -> Plan:
        return Plan.same([str(step) for step in range(len(grid))])


class Seen(nn.Module):
    """The pipeline's network, that notes the step it was named for."""

    def __init__(self, network: nn.Module, step: int, log: list[int]):
        super().__init__()
        self.call = partial(type(network).forward, network)  # no submodule
        self.step, self.log = step, log

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append(self.step)
        return self.call(*args, **kwargs)


def steps_seen(name: str, scheduler: Any, steps: int, per_step: int = 1, **call: Any) -> tuple[list[int], int]:
    """Steps that a policy saw, and of how many; the scheduler is called as often, or every `per_step` calls."""
    toy_ = toy(name)
    pipe = toy_[0]
    log: list[int] = []
    variants = {str(step): partial(Seen, step=step, log=log) for step in range(4 * steps)}
    made, step = [], scheduler.step

    @wraps(step)  # pipelines look for its arguments
    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(0)
        return step(*args, **kwargs)

    scheduler.step = counted
    with attach(pipe, Names(), variants) as handle:
        draw(toy_, scheduler, steps, **call)
        assert handle.grid.first == log[0]
    assert len(log) == per_step * len(made)
    return log, len(handle.grid)


@pytest.mark.parametrize("name", VP)
def test_every_step_is_seen_once_and_in_order(name):
    log, whole = steps_seen("sd", vp(name), 7)
    assert log == list(range(whole))


@pytest.mark.parametrize("name", VP)
def test_image_to_image_starts_in_the_middle_of_the_grid(name):
    if name in ("PNDM", "IPNDM"):
        pytest.skip("Diffusers cannot start these in the middle")
    log, whole = steps_seen("sd_img2img", vp(name), 10, strength=0.5)
    assert log == list(range(whole - len(log), whole))
    assert 0 < len(log) < whole


@pytest.mark.parametrize("strength", [0.7, 0.8, 0.9, 1.0])
def test_equal_timesteps_of_pndm(strength):
    """The second and third of its timesteps are equal; a run that starts at the third tells so with its second call."""
    log, whole = steps_seen("sd_img2img", vp("PNDM, PLMS"), 10, strength=strength)
    expected = list(range(whole - len(log), whole))
    assert log == ([1, *expected[1:]] if strength == 0.8 else expected)


@pytest.mark.parametrize("kind", EDM)
def test_edm(kind):
    scheduler = getattr(diffusers, kind)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    assert steps_seen("playground", scheduler, 7) == (list(range(7)), 7)


@pytest.mark.parametrize("kind", FLOW)
@pytest.mark.parametrize("name", ["sd3", "flux", "sd3_img2img", "flux_img2img", "sd3_inpaint"])
def test_flow(kind, name):
    if kind == "FlowMatchHeunDiscreteScheduler" and name != "sd3":
        pytest.skip("Diffusers gives it no mu, and image-to-image does not know its order")
    shifted = {"use_dynamic_shifting": True} if "flux" in name and "Heun" not in kind else {}
    log, whole = steps_seen(name, getattr(diffusers, kind)(**shifted), 5)
    assert log == list(range(whole - len(log), whole))
    assert (len(log) < whole) == ("img2img" in name or "inpaint" in name)


@pytest.mark.parametrize("name", ["sd_inpaint", "sdxl_inpaint", "sdxl_img2img", "pixart", "dit", "wan", "sana"])
def test_other_pipelines(name):
    log, whole = steps_seen(name, toy(name)[0].scheduler, 5, per_step=2 if name == "wan" else 1)
    seen = list(dict.fromkeys(log))
    assert sorted(log) == log
    assert seen == list(range(whole - len(seen), whole))


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_own_schedulers(solver):
    scheduler = diffaccel.scheduler(solver, toy("sd")[0])
    assert steps_seen("sd", scheduler, 6) == (list(range(6)), 6)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "dpm_2s", "heun", "unipc"])
def test_own_schedulers_from_a_picture(solver):
    scheduler = diffaccel.scheduler(solver, toy("sd_img2img")[0])
    assert steps_seen("sd_img2img", scheduler, 8, strength=0.5) == ([4, 5, 6, 7], 8)


@pytest.mark.parametrize(
    ("name", "scheduler", "given"),
    [
        ("sd", "DDPM", {"timesteps": [900, 500, 499, 100]}),
        ("sd", "EulerDiscrete", {"timesteps": [900, 500, 499, 100]}),
        ("sd", "DPMSolverMultistep", {"timesteps": [900, 500, 499, 100]}),
        ("sd", "EulerDiscrete", {"sigmas": [10.0, 9.99, 1.0, 0.1, 0.0]}),
        ("sd3", None, {"sigmas": [1.0, 0.6, 0.59, 0.2]}),
    ],
)
def test_own_timesteps_and_sigmas(name, scheduler, given):
    chosen = vp(scheduler) if scheduler else toy(name)[0].scheduler
    assert steps_seen(name, chosen, 4, **given) == (list(range(4)), 4)


def test_parts_of_a_run():
    """SDXL's base makes the first part, its refiner goes on there: both count the steps of the whole."""
    scheduler = toy("sdxl")[0].scheduler
    assert steps_seen("sdxl", copy.deepcopy(scheduler), 10, denoising_end=0.6)[0] == list(range(6))
    log, whole = steps_seen("sdxl_img2img", scheduler, 10, denoising_start=0.6)
    assert log == list(range(whole - len(log), whole))


def test_timesteps_rounded_to_bfloat16():
    pipe, call = toy("flux")
    pipe.transformer.to(torch.bfloat16)
    with diffaccel.stitch(pipe, smaller(pipe)) as handle:
        half = {key: v.bfloat16() if isinstance(v, torch.Tensor) else v for key, v in call.items()}
        draw((pipe, half), pipe.scheduler, 50)
        assert calls(handle) == {"small": 20, "full": 30}


# Without a pipeline, and from one run to the next


def test_scheduler_swapped_between_runs():
    pipe, call = toy("sd")
    with diffaccel.stitch(pipe, smaller(pipe)) as handle:
        for name in ("EulerDiscrete", "HeunDiscrete", "DDIM", "PNDM, PLMS", "EulerDiscrete", "LCM"):
            draw((pipe, call), vp(name), 5)
            whole = len(handle.grid)
            assert calls(handle) == {"small": whole * 2 // 5, "full": whole - whole * 2 // 5}


def test_loop_of_ones_own_run_twice():
    """Without `set_timesteps` between: a step that is before the last starts a new run."""
    pipe, _ = toy("sd")
    pipe.scheduler.set_timesteps(5)
    inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8)
    with diffaccel.stitch(pipe, smaller(pipe)) as handle, torch.no_grad():
        for _ in range(2):
            for time in pipe.scheduler.timesteps:
                pipe.unet(inputs[0], time, inputs[1])
            assert calls(handle) == {"small": 2, "full": 3}


def test_many_calls_in_a_step():
    """As pipelines do that go over a large picture in tiles."""
    pipe, _ = toy("sd")
    pipe.scheduler = vp("EulerDiscrete")
    pipe.scheduler.set_timesteps(3)
    x, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8)
    with diffaccel.stitch(pipe, smaller(pipe)) as handle, torch.no_grad():
        for time in pipe.scheduler.timesteps:
            tiles = [pipe.unet(pipe.scheduler.scale_model_input(x, time), time, text)[0] for _ in range(12)]
            x = pipe.scheduler.step(tiles[-1], time, x)[0]
        assert calls(handle) == {"small": 12, "full": 24}


def test_timesteps_are_looked_up_whatever_their_kind():
    scheduler = vp("DDIM")
    scheduler.set_timesteps(5)
    clock = Clock()
    assert clock.new_run(scheduler)
    assert not clock.new_run(scheduler)
    for step, time in enumerate(scheduler.timesteps):
        for told in (time, float(time), int(time), time[None], time.expand(3).float(), time.bfloat16(), time / 1000):
            assert clock.step(scheduler, told) == step
    with pytest.raises(ValueError, match="called at timestep 333, which is none of the scheduler's"):
        clock.lookup(333)
    assert np.isclose(clock.times[0], float(scheduler.timesteps[0]))


def test_network_before_its_scheduler_is_set():
    pipe, _ = toy("sd")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # other tests have set the toy's
    with diffaccel.stitch(pipe, smaller(pipe)), pytest.raises(ValueError, match=r"call scheduler.set_timesteps"):
        denoiser(pipe)(torch.zeros(1, 4, 8, 8), 999, torch.zeros(1, 4, 8))
