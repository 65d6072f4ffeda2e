"""Noise and state: the same seed is the same picture, whatever else is in the batch or in the process."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import diffaccel
from diffaccel import DDIMSolverScheduler, DPMSolverScheduler, FlowEulerScheduler, SolverScheduler, UniPCScheduler
from tests import tiny
from tests.tiny import SD_BETAS, Toy, draw, noise, relative

SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++", **SD_BETAS}
SCHEDULERS: dict[str, Callable[[], SolverScheduler]] = {
    "ddim": lambda: DDIMSolverScheduler(**SD_BETAS),
    "ddim eta": lambda: DDIMSolverScheduler(**SD_BETAS, solver_options={"eta": 0.7}),
    "dpmpp_2m": lambda: DPMSolverScheduler(**SD_BETAS),
    "dpmpp_2m_sde": lambda: DPMSolverScheduler(**SDE),
    "dpmpp_3m_sde": lambda: DPMSolverScheduler(**SDE, solver_order=3),
    "unipc": lambda: UniPCScheduler(**SD_BETAS),
    "unipc singlestep": lambda: UniPCScheduler(**SD_BETAS, solver_order=3, solver_options={"start": "singlestep"}),
    "flow": lambda: FlowEulerScheduler(shift=3.0),
    "flow sde": lambda: SolverScheduler(prediction_type="flow_prediction", solver_options={"solver": "dpmpp_2m_sde"}),
}
STOCHASTIC = ["ddim eta", "dpmpp_2m_sde", "dpmpp_3m_sde", "flow sde"]
CLASSES = [SolverScheduler, DDIMSolverScheduler, DPMSolverScheduler, UniPCScheduler, FlowEulerScheduler]
EVERY = pytest.mark.parametrize("name", SCHEDULERS)
EVERY_STOCHASTIC = pytest.mark.parametrize("name", STOCHASTIC)
STEPS = 6


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _network(x: Tensor, t: Tensor) -> Tensor:
    """Acts on each sample alone, so that any mixing within a batch is the scheduler's."""
    return 0.3 * torch.tanh(x) + 1e-4 * t


def _run(scheduler: SolverScheduler, x: Tensor, generator: Any = None, last: int = STEPS) -> Tensor:
    scheduler.set_timesteps(STEPS)
    return _go_on(scheduler, x, generator, 0, last)


def _go_on(scheduler: SolverScheduler, x: Tensor, generator: Any, first: int, last: int = STEPS) -> Tensor:
    for t in scheduler.timesteps[first:last]:
        x = scheduler.step(_network(x, t), t, x, generator).prev_sample
    return x


@EVERY
@pytest.mark.parametrize("toy", [tiny.sd, tiny.sd_img2img], ids=operator.attrgetter("__name__"))
def test_same_seed_same_picture_alone_or_in_a_batch(toy: Callable[[], Toy], name: str) -> None:
    if name == "flow sde":
        pytest.skip("the flow pipelines of Diffusers do not hand their generator to step()")
    if SCHEDULERS[name]().schedule.path == "flow":
        toy = {tiny.sd: tiny.sd3, tiny.sd_img2img: tiny.sd3_img2img}[toy]
    call = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in toy()[1].items() if isinstance(v, Tensor)}
    together = draw(toy(), SCHEDULERS[name](), STEPS, generator=_generators(3, 4), **call)
    for seed, picture in zip((3, 4), together, strict=True):
        alone = draw(toy(), SCHEDULERS[name](), STEPS, generator=_generators(seed)[0])
        assert relative(picture[None], alone) < 1e-5
    assert relative(together[0], together[1]) > 0.01


@EVERY_STOCHASTIC
def test_noise_is_bit_for_bit_that_of_the_generator(name: str) -> None:
    """A generator, a list of one, or a place in a list of three: one stream, drawn in float32 in the sample's shape."""
    x = noise(3, 4, 5, 5)
    together = _run(SCHEDULERS[name](), x, _generators(1, 2, 3))
    for i in range(3):
        (one,) = _generators(i + 1)
        assert torch.equal(_run(SCHEDULERS[name](), x[i : i + 1], one), together[i : i + 1])
        assert torch.equal(_run(SCHEDULERS[name](), x[i : i + 1], _generators(i + 1)), together[i : i + 1])


@EVERY_STOCHASTIC
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_does_not_depend_on_the_dtype(name: str, dtype: torch.dtype) -> None:
    scheduler, x = SCHEDULERS[name](), noise(2, 4, 5, 5)
    drawn = []
    for kind in (torch.float32, dtype):
        scheduler.set_timesteps(STEPS)
        outs = [
            scheduler_at_start.step(x.to(kind), scheduler.timesteps[0], x.to(kind), *_generators(seed)).prev_sample
            for scheduler_at_start, seed in ((copy.deepcopy(scheduler), 0), (copy.deepcopy(scheduler), 1))
        ]
        drawn.append((outs[0] - outs[1]).double())
    assert relative(drawn[1], drawn[0]) < 4 * torch.finfo(dtype).eps + 1e-6


@EVERY_STOCHASTIC
def test_noise_differs_from_step_to_step_and_has_its_declared_size(name: str) -> None:
    scheduler, x = SCHEDULERS[name](), torch.zeros(1, 4, 64, 64)
    scheduler.set_timesteps(STEPS)
    (generator,) = _generators(0)
    steps = [scheduler.step(x, t, x, generator).prev_sample for t in scheduler.timesteps]
    sizes = [float(step.std()) for step in steps]
    assert sizes == pytest.approx([step.predict.noise for step in scheduler._plan], rel=0.03)
    assert sizes[-1] == 0  # the step to sigma = 0 adds none
    first, second = (step.flatten() / step.std() for step in steps[:2])
    assert abs(float((first * second).mean())) < 0.05


@EVERY
def test_global_generator_is_left_alone(name: str) -> None:
    """Nothing is drawn but from the given generator; deterministic solvers draw nothing at all."""
    before = torch.get_rng_state()
    scheduler = SCHEDULERS[name]()
    _run(scheduler, noise(1, 4, 5, 5), None if scheduler.solver.eta == 0 else _generators(0)[0])
    scheduler.add_noise(noise(1, 4, 5, 5), noise(1, 4, 5, 5), scheduler.timesteps[:1])
    assert torch.equal(torch.get_rng_state(), before)


def test_deterministic_solvers_leave_the_generator_alone() -> None:
    (generator,) = _generators(0)
    before = generator.get_state()
    _run(SCHEDULERS["unipc"](), noise(1, 4, 5, 5), generator)
    assert torch.equal(generator.get_state(), before)


def test_without_a_generator_the_global_seed_decides() -> None:
    pictures = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pictures.append(_run(SCHEDULERS["dpmpp_2m_sde"](), noise(1, 4, 5, 5)))
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


@EVERY
@pytest.mark.parametrize("done", [0, 1, 2, 5])
def test_deep_copy_goes_on_where_the_original_is(name: str, done: int) -> None:
    """Pipelines copy their scheduler, `from_pipe` and distributed ones in the middle of a run too."""
    scheduler, x = SCHEDULERS[name](), noise(1, 4, 5, 5)
    whole = _run(scheduler, x, _generators(0)[0])
    (generator,) = _generators(0)
    half = _run(scheduler, x, generator, last=done)
    state = generator.get_state()
    for each in (copy.deepcopy(scheduler), scheduler):  # the copy first: it must leave the original as it was
        generator.set_state(state)
        assert torch.equal(_go_on(each, half, generator, done), whole)


@EVERY
def test_a_second_run_is_the_first_again(name: str) -> None:
    """Also after a run that stopped halfway, and after one of another length and shape."""
    scheduler, x = SCHEDULERS[name](), noise(1, 4, 5, 5)
    first = _run(scheduler, x, _generators(0)[0])
    assert torch.equal(_run(scheduler, x, _generators(0)[0]), first)
    _run(scheduler, noise(2, 4, 3, 3), _generators(5)[0], last=3)
    assert torch.equal(_run(scheduler, x, _generators(0)[0]), first)


def test_inputs_are_not_written_to() -> None:
    for make in SCHEDULERS.values():
        scheduler, x = make(), noise(1, 4, 5, 5)
        scheduler.set_timesteps(STEPS)
        output, kept = noise(1, 4, 5, 5, seed=1), x.clone()
        for t in scheduler.timesteps:
            scheduler.step(output, t, x, _generators(0)[0])
        assert torch.equal(x, kept)
        assert torch.equal(output, noise(1, 4, 5, 5, seed=1))


def test_picture_of_the_factory_has_the_seed_of_its_class() -> None:
    pipe, _ = toy = tiny.sd()
    pipe.scheduler = DPMSolverScheduler(**SD_BETAS)
    by_name = draw(toy, diffaccel.scheduler("dpmpp_2m_sde", pipe), STEPS)
    assert torch.equal(by_name, draw(toy, SCHEDULERS["dpmpp_2m_sde"](), STEPS))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_add_noise_keeps_dtype_and_follows_the_path(cls: Any, dtype: torch.dtype) -> None:
    scheduler = cls()
    scheduler.set_timesteps(10)
    x0, eps = noise(2, 4, 5, 5, seed=1).to(dtype), noise(2, 4, 5, 5, seed=2).to(dtype)
    for times in (scheduler.timesteps[3], scheduler.timesteps[3:4], scheduler.timesteps[3:5]):
        noisy = scheduler.add_noise(x0, eps, times)
        assert noisy.dtype == dtype
        for i, t in enumerate(times.expand(len(x0))):
            alpha, sigma = scheduler.schedule.alpha_sigma(float(scheduler.schedule.lambda_at(float(t))))
            expected = alpha * x0[i].double() + sigma * eps[i].double()
            assert relative(noisy[i], expected) < 2 * torch.finfo(dtype).eps + 1e-6
        assert torch.equal(scheduler.scale_noise(x0, times, eps), noisy)


@pytest.mark.parametrize("cls", CLASSES[:-1])
def test_add_noise_for_training_agrees_with_diffusers(cls: Any) -> None:
    """Integer timesteps drawn at random, without set_timesteps."""
    times = torch.tensor([0, 17, 500, 999])
    x0, eps = noise(4, 3, 4, 4, seed=1), noise(4, 3, 4, 4, seed=2)
    stock = diffusers.DDPMScheduler(**SD_BETAS).add_noise(x0, eps, times)
    assert relative(cls(**SD_BETAS).add_noise(x0, eps, times), stock) < 1e-5


@pytest.mark.parametrize("cls", CLASSES)
def test_add_noise_after_a_step_uses_the_given_time(cls: Any) -> None:
    """Inpainting noises the known half to the level of the next node, in the middle of a run."""
    scheduler, x = cls(), noise(2, 4, 5, 5)
    scheduler.set_timesteps(5)
    before = scheduler.add_noise(x, x, scheduler.timesteps[2:3])
    scheduler.step(0.1 * x, scheduler.timesteps[0], x)
    assert torch.equal(scheduler.add_noise(x, x, scheduler.timesteps[2:3]), before)
    assert scheduler.step_index == 1
