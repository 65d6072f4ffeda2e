"""What pipelines and users expect of any Diffusers scheduler, after upstream's SchedulerCommonTest."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, SchedulerMixin
from torch import Tensor

import diffaccel
from diffaccel import DDIMSolverScheduler, DPMSolverScheduler, FlowEulerScheduler, SolverScheduler, UniPCScheduler
from diffaccel.samplers.scheduler import SolverSchedulerOutput
from tests.tiny import noise, relative

CLASSES: list[Any] = [
    SolverScheduler,
    DDIMSolverScheduler,
    DPMSolverScheduler,
    UniPCScheduler,
    FlowEulerScheduler,
]
EVERY = pytest.mark.parametrize("cls", CLASSES)
GAUSSIAN = pytest.mark.parametrize("cls", CLASSES[:-1])
SHAPE = (2, 4, 5, 5)


def _network(x: Tensor, t: Any) -> Tensor:
    return (0.3 * torch.tanh(x.float()) + 1e-4 * float(t)).to(x.dtype)


def _run(scheduler: SolverScheduler, steps: int = 6, dtype: torch.dtype = torch.float32, begin: int = 0) -> Tensor:
    scheduler.set_timesteps(steps)
    if begin:
        scheduler.set_begin_index(begin)
    x = noise(*SHAPE).to(dtype)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(_network(x, t), t, x).prev_sample
    return x


@EVERY
def test_public_interface(cls: Any) -> None:
    """What pipelines touch, with the names that `retrieve_timesteps` and `prepare_extra_step_kwargs` look for."""
    scheduler = cls()
    assert isinstance(scheduler, SchedulerMixin)
    assert isinstance(scheduler, ConfigMixin)
    assert cls.order == 1
    assert len(scheduler) == 1000
    assert cls.__module__ == "diffaccel"
    assert getattr(diffaccel, cls.__name__) is cls
    assert {"num_inference_steps", "device", "timesteps", "sigmas", "mu"} <= _parameters(cls.set_timesteps)
    assert {"model_output", "timestep", "sample", "generator", "return_dict"} <= _parameters(cls.step)
    assert list(inspect.signature(cls.scale_noise).parameters)[1:] == ["sample", "timestep", "noise"]
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in inspect.signature(cls).parameters.values())
    x = noise(*SHAPE)
    assert scheduler.init_noise_sigma == 1
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x


@EVERY
def test_config_round_trip(cls: Any) -> None:
    scheduler = cls(beta_end=0.015, shift=2.0, solver_options={"timesteps": "integer", "lower_final": 3})
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        again = cls.from_pretrained(folder)
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == {
        k: v for k, v in scheduler.config.items() if not k.startswith("_")
    }
    assert torch.equal(_run(again), _run(scheduler))
    assert torch.equal(_run(cls.from_config(scheduler.config)), _run(scheduler))


@EVERY
def test_overrides_win_over_the_config(cls: Any) -> None:
    base = cls(shift=2.0)
    assert cls.from_config(base.config, shift=5.0).config["shift"] == 5.0
    ours, unused = cls.from_config(base.config, shift=5.0, foreign=1, return_unused_kwargs=True)
    assert ours.config["shift"] == 5.0
    assert unused["foreign"] == 1


@EVERY
def test_defaults_of_the_source_do_not_bind_the_next_class(cls: Any) -> None:
    """Upstream's test_default_arguments_not_in_config: a key nobody chose follows the class that reads it."""
    source = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert "solver_order" in cls.from_config(source.config).config["_use_default_values"]


@EVERY
def test_tuple_and_dict_outputs_are_equal(cls: Any) -> None:
    x = noise(*SHAPE)
    results = []
    for return_dict in (True, False):
        scheduler = cls()
        scheduler.set_timesteps(5)
        results.append(scheduler.step(0.1 * x, scheduler.timesteps[0], x, return_dict=return_dict))
    output, (sample,) = results
    assert isinstance(output, SolverSchedulerOutput)
    assert torch.equal(output.prev_sample, sample)
    assert output[0] is output.prev_sample
    assert output.pred_original_sample.shape == x.shape


@EVERY
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 16, 32), (1, 4, 3, 6, 6), (3, 7)], ids=str)
def test_step_keeps_the_shape(cls: Any, shape: tuple[int, ...]) -> None:
    """Pictures, Flux's packed latents, videos, plain vectors."""
    scheduler, x = cls(), noise(*shape)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    assert x.shape == shape
    assert x.isfinite().all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_of_any_float_dtype(cls: Any, dtype: torch.dtype) -> None:
    """The step itself is float32 (or float64), so that only storing the sample rounds: some eps a step."""
    x = _run(cls(), dtype=dtype)
    assert x.dtype == dtype
    assert relative(x, _run(cls())) < 20 * torch.finfo(dtype).eps + 1e-6


@EVERY
def test_output_has_the_dtype_of_the_network(cls: Any) -> None:
    """A float16 network with float32 latents: upstream casts the sample to the output's dtype."""
    scheduler = cls()
    scheduler.set_timesteps(4)
    output = scheduler.step(noise(*SHAPE).half(), scheduler.timesteps[0], noise(*SHAPE))
    assert output.prev_sample.dtype == torch.float16
    assert output.pred_original_sample.dtype == torch.float32


@EVERY
@pytest.mark.parametrize("kind", ["view", "tensor", "float", "one element"])
def test_timestep_may_be_told_in_any_form(cls: Any, kind: str) -> None:
    form: dict[str, Callable[[Tensor], Any]] = {
        "view": lambda t: t,
        "tensor": lambda t: t.clone(),
        "float": float,
        "one element": lambda t: t.clone()[None],
    }
    scheduler, x = cls(), noise(*SHAPE)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        x = scheduler.step(_network(x, t), form[kind](t), x).prev_sample
    assert torch.equal(x, _run(cls()))


@EVERY
def test_indices_follow_the_run(cls: Any) -> None:
    scheduler, x = cls(), noise(*SHAPE)
    assert scheduler.step_index is None
    scheduler.set_timesteps(5)
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    for i, t in enumerate(scheduler.timesteps):
        assert scheduler.index_for_timestep(t) == i
        scheduler.step(0.1 * x, t, x)
        assert scheduler.step_index == i + 1
    scheduler.set_timesteps(3)
    assert scheduler.step_index is None
    scheduler.set_begin_index(1)
    assert scheduler.begin_index == 1


@EVERY
@pytest.mark.parametrize("begin", [1, 4, 5])
def test_begin_index_is_a_run_over_the_rest_of_the_grid(cls: Any, begin: int) -> None:
    """The warm-up starts there, and the slice of timesteps that img2img runs over finds the same place by itself."""
    scheduler = cls(lower_order_final=False)
    started = _run(scheduler, begin=begin)
    scheduler.set_timesteps(6)
    x = noise(*SHAPE)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(_network(x, t), t, x).prev_sample
    assert torch.equal(x, started)
    rest = cls(lower_order_final=False, solver_options={"lower_final": 0})
    whole = cls(lower_order_final=False, solver_options={"lower_final": 0})
    whole.set_timesteps(6)
    rest.set_timesteps(timesteps=whole.timesteps[begin:].tolist())
    x = noise(*SHAPE)
    for t in rest.timesteps:
        x = rest.step(_network(x, t), t, x).prev_sample
    assert relative(_run(whole, begin=begin), x) < 1e-5


@GAUSSIAN
@pytest.mark.parametrize("kind", [list, np.array, tuple])
def test_trained_betas_replace_the_named_ones(cls: Any, kind: Any) -> None:
    betas = np.linspace(1e-4, 0.3, 25).tolist()
    scheduler = cls(trained_betas=kind(betas), num_train_timesteps=25)
    expected = diffusers.DDPMScheduler(trained_betas=betas, num_train_timesteps=25).alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=1e-5, atol=1e-7)
    assert _run(scheduler).isfinite().all()
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        assert torch.equal(_run(cls.from_pretrained(folder)), _run(scheduler))


@EVERY
def test_attributes_are_found_or_refused(cls: Any) -> None:
    scheduler = cls()
    scheduler.mine = 3
    assert scheduler.mine == 3
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = scheduler.nothing


@pytest.mark.parametrize("cls", CLASSES[:-1])
@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_learned_variance_is_left_out(cls: Any, kind: str) -> None:
    """DeepFloyd and DiT-like networks return twice the channels where the pipeline does not split them."""
    scheduler, plain, x = cls(variance_type=kind), cls(), noise(*SHAPE)
    output = noise(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], seed=1)
    for s in (scheduler, plain):
        s.set_timesteps(4)
    expected = plain.step(output[:, : SHAPE[1]], plain.timesteps[0], x).prev_sample
    assert torch.equal(scheduler.step(output, scheduler.timesteps[0], x).prev_sample, expected)


@GAUSSIAN
def test_clocks_have_the_dtype_networks_expect(cls: Any) -> None:
    scheduler = cls(solver_options={"timesteps": "integer"})
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.dtype == torch.int64
    exact = cls()
    exact.set_timesteps(7)
    assert exact.timesteps.dtype == torch.float32
    assert torch.equal(exact.timesteps.round().long(), scheduler.timesteps)
    assert scheduler.sigmas.device.type == "cpu"
    assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1


@GAUSSIAN
def test_dynamic_thresholding_bounds_the_prediction(cls: Any) -> None:
    scheduler, x = cls(thresholding=True, sample_max_value=2.0), noise(*SHAPE)
    stock = diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=2.0)
    scheduler.set_timesteps(4)
    x0 = scheduler.step(9 * x, scheduler.timesteps[2], x).pred_original_sample
    alpha, sigma = scheduler.schedule.alpha_sigma(scheduler.grid.lambdas[2])
    torch.testing.assert_close(x0, stock._threshold_sample((x - sigma * 9 * x) / alpha), rtol=1e-4, atol=1e-5)
    assert x0.abs().max() <= 1


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)
