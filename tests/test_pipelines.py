"""Real pipelines at toy size: with our scheduler in place of Diffusers' own, the picture is the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import diffaccel
from diffaccel import DDIMSolverScheduler, DPMSolverScheduler, FlowEulerScheduler, SolverScheduler, UniPCScheduler
from tests import tiny
from tests.tiny import SD_BETAS, Toy, draw, relative

# Diffusers rounds its clock, and keeps coefficients in float32: a few ulp a step, times 1 / alpha at the first one.
CLOSE = 1e-5
INTEGER = {"timesteps": "integer"}
VP = [tiny.sd, tiny.sd_img2img, tiny.sd_inpaint, tiny.sdxl, tiny.sdxl_img2img, tiny.sdxl_inpaint, tiny.dit, tiny.pixart]
NAME = operator.attrgetter("__name__")
FLOW = [
    *(tiny.sd3, tiny.sd3_img2img, tiny.sd3_inpaint, tiny.flux, tiny.flux_img2img, tiny.flux_inpaint),
    *(tiny.sana, tiny.wan, tiny.hunyuan_video),
]
# Stock class, its config, our class, options beside the integer clock
VP_PAIRS = {
    "ddim-leading": (DDIMScheduler, {"clip_sample": False}, DDIMSolverScheduler, {}),
    "ddim-trailing": (
        DDIMScheduler,
        {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": False},
        DDIMSolverScheduler,
        {},
    ),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}, DPMSolverScheduler, {}),
    "dpmpp_2m-karras": (
        DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True},
        DPMSolverScheduler,
        {},
    ),
    "dpmpp_3m": (
        DPMSolverMultistepScheduler,
        {"solver_order": 3, "timestep_spacing": "trailing"},
        DPMSolverScheduler,
        {"halve_curvature": True},
    ),
    "dpmpp_2m-zero-snr": (
        DPMSolverMultistepScheduler,
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        DPMSolverScheduler,
        {},
    ),
    "dpmpp_2m_sde": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "leading"},
        DPMSolverScheduler,
        {},
    ),
    "unipc": (UniPCMultistepScheduler, {}, UniPCScheduler, {}),
    "unipc_3": (UniPCMultistepScheduler, {"solver_order": 3}, UniPCScheduler, {}),
}
# The same for flow models; the grid and the clock are always ours, see `_on_our_grid`.
FLOW_PAIRS = {
    "dpmpp_1": (DPMSolverMultistepScheduler, {"solver_order": 1}, DPMSolverScheduler),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}, DPMSolverScheduler),
    "dpmpp_2m-heun": (DPMSolverMultistepScheduler, {"solver_type": "heun"}, DPMSolverScheduler),
    "dpmpp_3m": (DPMSolverMultistepScheduler, {"solver_order": 3}, DPMSolverScheduler),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, DPMSolverScheduler),
    "unipc": (UniPCMultistepScheduler, {}, UniPCScheduler),
    "unipc_3": (UniPCMultistepScheduler, {"solver_order": 3}, UniPCScheduler),
}


def _stock_flow(toy: Callable[[], Toy]) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting="flux" in toy.__name__)


def _on_our_grid(stock_class: Any, config: dict[str, Any], ours: SolverScheduler) -> Any:
    """Stock scheduler with its own steps, on the grid of `ours` and telling the network its times.

    It tells whole timesteps (997 for 997.3), which are not those of its sigmas, and lacks part of what flow pipelines
    ask for: `sigmas=` together with `mu=` (Flux), `scale_noise` (image-to-image).
    """

    class Stock(stock_class):
        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
        ) -> None:
            ours.set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu)
            super().set_timesteps(len(ours.timesteps), device)
            lambdas = torch.tensor(ours.grid.lambdas, dtype=torch.float64)  # it takes log(1 - sigma)
            self.timesteps, self.sigmas = ours.timesteps, torch.special.expit(-lambdas)

        def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
            return ours.scale_noise(sample, timestep, noise)

    return Stock(**config)


@pytest.mark.parametrize("pair", VP_PAIRS)
@pytest.mark.parametrize("toy", VP, ids=NAME)
def test_vp_pipelines_agree_with_diffusers(toy: Callable[[], Toy], pair: str) -> None:
    stock_class, config, ours_class, options = VP_PAIRS[pair]
    stock = stock_class(**SD_BETAS, steps_offset=1, **config)
    ours = ours_class.from_config(stock.config, solver_options=INTEGER | options)
    # 8 divides 1000: DDIM's own `trailing` steps to t - 1000 // n, which otherwise is not the next timestep.
    assert relative(draw(toy(), ours, 8), draw(toy(), stock, 8)) < CLOSE


@pytest.mark.parametrize("strength", [0.13, 0.5, 1.0])
@pytest.mark.parametrize("pair", VP_PAIRS)
def test_img2img_agrees_with_diffusers_at_any_strength(pair: str, strength: float) -> None:
    stock_class, config, ours_class, options = VP_PAIRS[pair]
    stock = stock_class(**SD_BETAS, steps_offset=1, **config)
    ours = ours_class.from_config(stock.config, solver_options=INTEGER | options)
    toy = tiny.sd_img2img()
    assert relative(draw(toy, ours, 8, strength=strength), draw(toy, stock, 8, strength=strength)) < CLOSE


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("toy", FLOW, ids=NAME)
def test_flow_pipelines_agree_with_diffusers(toy: Callable[[], Toy], steps: int) -> None:
    stock = _stock_flow(toy)
    ours = FlowEulerScheduler.from_config(stock.config)
    assert relative(draw(toy(), ours, steps), draw(toy(), stock, steps)) < CLOSE


@pytest.mark.parametrize("steps", [4, 7])
@pytest.mark.parametrize("pair", FLOW_PAIRS)
@pytest.mark.parametrize("toy", FLOW, ids=NAME)
def test_multistep_solvers_agree_with_diffusers_in_flow_pipelines(
    toy: Callable[[], Toy], pair: str, steps: int
) -> None:
    stock_class, keys, ours_class = FLOW_PAIRS[pair]
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0, **keys}
    dynamic = "flux" in toy.__name__
    ours, grid = (ours_class(**config, use_dynamic_shifting=dynamic) for _ in range(2))
    stock = _on_our_grid(stock_class, config, grid)
    assert relative(draw(toy(), ours, steps), draw(toy(), stock, steps)) < CLOSE


@pytest.mark.parametrize("cls", [DPMSolverScheduler, UniPCScheduler])
@pytest.mark.parametrize("toy", [tiny.sana, tiny.wan], ids=NAME)
def test_shipped_flow_configs_converge(toy: Callable[[], Toy], cls: Any) -> None:
    """Runs as the checkpoints' configs ask, in clock too: Diffusers' own are not exact enough to compare with.

    There the network is told times cut to integers, an error that more steps do not mend. Our own runs of 4 and of 16
    times the steps take their place.
    """
    ours = cls.from_config(toy()[0].scheduler.config)
    few, more, many = (draw(toy(), ours, steps) for steps in (16, 64, 256))
    assert relative(more, many) < relative(few, many) / 6  # 16 is second order in full, 4 is first order


def test_shipped_wan_config_keeps_its_grid() -> None:
    pipe, _ = tiny.wan()
    stock, ours = pipe.scheduler, diffaccel.scheduler("unipc", pipe)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(12)
    assert relative(ours.sigmas, stock.sigmas) < CLOSE
    assert ((ours.timesteps - stock.timesteps).abs() <= 1).all()  # cut to integers there


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("toy", FLOW, ids=NAME)
def test_flow_pipelines_keep_their_spacing(toy: Callable[[], Toy], key: str) -> None:
    """Flux passes sigmas of its own, and FlowMatchEuler spaces them anew between their ends."""
    stock: Any = FlowMatchEulerDiscreteScheduler.from_config(_stock_flow(toy).config, **{key: True})
    ours = FlowEulerScheduler.from_config(stock.config)
    assert relative(draw(toy(), ours, 7), draw(toy(), stock, 7)) < CLOSE


@pytest.mark.parametrize("schedule", ["karras", "logsnr", "beta"])
@pytest.mark.parametrize("toy", [tiny.sd3, tiny.flux], ids=NAME)
def test_schedule_chosen_by_name_is_used_in_flow_pipelines(toy: Callable[[], Toy], schedule: str) -> None:
    pipe, _ = toy()
    plain, chosen = (diffaccel.scheduler("dpmpp_2m", pipe, schedule=name) for name in (None, schedule))
    assert relative(draw(toy(), chosen, 7), draw(toy(), plain, 7)) > 1e-3


@pytest.mark.parametrize("cls", [DPMSolverScheduler, UniPCScheduler, SolverScheduler, FlowEulerScheduler])
@pytest.mark.parametrize("toy", FLOW, ids=NAME)
def test_every_solver_converges_to_the_same_flow_picture(toy: Callable[[], Toy], cls: Any) -> None:
    ours = cls.from_config(_stock_flow(toy).config)
    few, many = (relative(draw(toy(), ours, steps), _flow_limit(toy)) for steps in (5, 60))
    assert many < 0.02
    assert many < few / 4


@cache
def _flow_limit(toy: Callable[[], Toy]) -> Tensor:
    return draw(toy(), _stock_flow(toy), 300)


def test_video_pipeline_in_another_clock_agrees_with_diffusers() -> None:
    """SVD samples with Euler on sigma / alpha: the same curve as DDIM's, although x is scaled differently."""
    pipe, _ = toy = tiny.svd()
    stock: Any = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ours = DDIMSolverScheduler.from_config(stock.config)
    assert relative(draw(toy, ours, 6), draw(toy, stock, 6)) < CLOSE


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("stock_class", "solver"), [(EDMEulerScheduler, "euler"), (EDMDPMSolverMultistepScheduler, "dpmpp_2m")]
)
def test_edm_pipelines_agree_with_diffusers(stock_class: Any, solver: str, schedule: str) -> None:
    pipe, _ = toy = tiny.playground()
    stock = pipe.scheduler = stock_class.from_config(pipe.scheduler.config, sigma_schedule=schedule)
    assert relative(draw(toy, diffaccel.scheduler(solver, pipe), 7), draw(toy, stock, 7)) < CLOSE


def test_decoded_pictures_agree_too() -> None:
    stock = DPMSolverMultistepScheduler(**SD_BETAS, steps_offset=1)
    ours = DPMSolverScheduler.from_config(stock.config, solver_options=INTEGER)
    a, b = (draw(tiny.sd(), scheduler, 6, output_type="np") for scheduler in (ours, stock))
    assert (a - b).abs().max() < 1e-4  # of a range of 1
    assert a.std() > 0.01


def test_factory_takes_a_pipeline_and_keeps_its_schedule() -> None:
    pipe, _ = toy = tiny.sd()
    stock = DPMSolverMultistepScheduler(**SD_BETAS, steps_offset=1, use_karras_sigmas=True)
    pipe.scheduler = DDIMScheduler(**SD_BETAS, clip_sample=False, steps_offset=1)
    ours = diffaccel.scheduler("DPM++ 2M Karras", pipe, timesteps="integer")
    assert relative(draw(toy, ours, 6), draw(toy, stock, 6)) < CLOSE


def test_callback_sees_every_step() -> None:
    seen: list[float] = []

    def note(pipe: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(float(t))
        return values

    scheduler = UniPCScheduler(**SD_BETAS)
    draw(tiny.sd(), scheduler, 5, callback_on_step_end=note)
    assert seen == scheduler.timesteps.tolist()
    assert scheduler.step_index == 5
