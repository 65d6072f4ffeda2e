"""Every solver where runs are unusual: begun anywhere, copied, saved, in other dtypes, in batches, out of order.

What the options of a run do is in test_edge_options.py, what changes x0 in test_filters.py, and what fails today in
test_edge_defects.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import diffaccel
from diffaccel import SolverScheduler
from diffaccel.samplers.catalog import SOLVERS
from diffaccel.samplers.named import NAMED
from diffaccel.samplers.plan import is_singlestep
from tests.samplers.point_mass import NETWORKS, X0, at_level, level, samples
from tests.tiny import noise, relative

EVERY = pytest.mark.parametrize("solver", SOLVERS)
STOCHASTIC = [name for name in SOLVERS if SOLVERS[name].stochastic]
PATHS = ("epsilon", "edm", "flow")


def make(solver: str, network: str = "epsilon", **options: Any) -> SolverScheduler:
    return diffaccel.scheduler(solver, NETWORKS[network], **options)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def smooth(x: Tensor, t: Any) -> Tensor:
    return (0.3 * torch.tanh(x.float()) + 1e-4 * float(t)).to(x.dtype)


def go_on(scheduler: SolverScheduler, x: Tensor, generator: Any, first: int = 0, last: int | None = None) -> Tensor:
    for t in scheduler.timesteps[first:last]:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(smooth(seen, t), t, x, generator, return_dict=False)[0]
    return x


def run(scheduler: SolverScheduler, n: int = 7, x: Tensor | None = None, generator: Any = None) -> Tensor:
    scheduler.set_timesteps(n)
    start = noise(1, 2, 2, 2) * scheduler.init_noise_sigma
    return go_on(scheduler, start if x is None else x, generator or seed())


@pytest.mark.parametrize("announced", [True, False], ids=["begin index", "first timestep"])
@pytest.mark.parametrize("network", PATHS)
@EVERY
def test_run_may_begin_anywhere(solver: str, network: str, announced: bool) -> None:
    """Image-to-image, also inside the step of a solver of several stages: the one picture is still returned."""
    scheduler = make(solver, network)
    for n in (1, 6, 7):
        for begin in range(n):
            scheduler.set_timesteps(n)
            if announced:
                scheduler.set_begin_index(begin)
            all_samples = samples(scheduler, at_level(scheduler, begin), seed(), begin)
            assert relative(all_samples[-1], X0) < 1e-5, (n, begin)
            assert scheduler.step_index == n
            if not scheduler.solver.stochastic:
                for i, x in enumerate(all_samples[:-1], begin):
                    assert relative(x, at_level(scheduler, i)) < 1e-5, (n, begin, i)


@pytest.mark.parametrize("network", PATHS)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_noise_is_that_of_the_level_wherever_a_run_begins(solver: str, network: str) -> None:
    """With one picture to return, what a sample has beyond it must be noise of the level of its call."""
    if solver in ("dpm_2m_sde", "dpm_3m_sde"):
        pytest.skip("on eps, the SDE of DPM-Solver carries on noise: see test_edge_defects.py")
    scheduler = make(solver, network)
    x0, eps = torch.zeros(1, 1, 64, 64), noise(1, 1, 64, 64, seed=2).double()
    for begin in (0, 1, 2, 3):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)
        start = at_level(scheduler, begin, x0, eps)
        for i, x in enumerate(samples(scheduler, start, seed(), begin, x0)[:-1], begin):
            sigma = level(scheduler, i)[1]
            # Accelerated DDPM draws the noise of the next call with that of this one; EDM's s_noise is 1.003.
            assert float(x.std()) > 0.95 * sigma, (begin, i)
            assert float(x.std()) < (1.06 * sigma if solver != "accelerated_ddpm" else float("inf")), (begin, i)


@pytest.mark.parametrize("network", PATHS)
@EVERY
def test_copy_goes_on_where_the_original_is(solver: str, network: str) -> None:
    scheduler, x = make(solver, network), noise(1, 2, 2, 2)
    whole = run(scheduler, 7, x)
    for done in range(7):
        scheduler.set_timesteps(7)
        generator = seed()
        half = go_on(scheduler, x, generator, 0, done)
        state = generator.get_state()
        for each in (copy.deepcopy(scheduler), scheduler):
            generator.set_state(state)
            assert torch.equal(go_on(each, half, generator, done), whole), done


@pytest.mark.parametrize("network", ["v", "edm", "flow"])
@EVERY
def test_saved_solver_is_the_same_solver(tmp_path: Path, solver: str, network: str) -> None:
    scheduler = make(solver, network)
    scheduler.save_pretrained(tmp_path)
    again: Any = type(scheduler).from_pretrained(tmp_path)
    copied: Any = type(scheduler).from_config(scheduler.config)
    for other in (again, copied):
        assert other.solver == scheduler.solver
        assert torch.equal(run(other), run(scheduler))


@pytest.mark.parametrize("network", ["v", "edm", "flow"])
@pytest.mark.parametrize("cls", NAMED, ids=lambda cls: cls.__name__)
def test_saved_class_is_the_same_class(tmp_path: Path, cls: Any, network: str) -> None:
    if cls is diffaccel.FlowEulerScheduler and network != "flow":
        return
    scheduler = cls.from_config(NETWORKS[network])
    scheduler.save_pretrained(tmp_path)
    again = diffaccel.__dict__[cls.__name__].from_pretrained(tmp_path)
    assert type(again) is cls
    assert again.solver == scheduler.solver
    assert torch.equal(run(again), run(scheduler))


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
@EVERY
def test_diffusers_class_takes_over_and_gives_back(solver: str, name: str) -> None:
    """Its class drops nothing of ours, so that the way back ends at the same solver and the same pictures."""
    ours = make(solver, "v", schedule="karras")
    if name == "DPMSolverMultistepScheduler" and ours.config["algorithm_type"] in ("dpmsolver", "sde-dpmsolver"):
        with pytest.raises(ValueError, match="final_sigmas_type"):  # which Diffusers has for DPM-Solver++ only
            diffusers.DPMSolverMultistepScheduler.from_config(ours.config)
        return
    if name == "DPMSolverMultistepScheduler" and ours.config["solver_type"] == "bh1":
        pytest.skip("DPMSolverMultistepScheduler itself writes midpoint into its config for bh1")
    theirs = getattr(diffusers, name).from_config(ours.config)
    assert theirs.config["prediction_type"] == "v_prediction"
    theirs.set_timesteps(6)
    assert theirs.timesteps.isfinite().all()
    back: Any = type(ours).from_config(theirs.config)
    assert back.solver == ours.solver
    assert torch.equal(run(back), run(ours))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@EVERY
def test_samples_of_any_float_dtype(solver: str, dtype: torch.dtype) -> None:
    """Only storing the sample rounds; extrapolation enlarges that a little."""
    start = noise(1, 2, 2, 2)
    for network in ("v", "flow"):
        if solver in ("dpm_2m_sde", "dpm_3m_sde") and network == "flow":
            continue  # see test_edge_defects.py
        expected = run(make(solver, network), 10, start.double())
        x = run(make(solver, network), 10, start.to(dtype))
        assert x.dtype == dtype
        assert relative(x, expected) < 60 * torch.finfo(dtype).eps + 1e-6, network


@pytest.mark.parametrize("network", PATHS)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_list_of_generators_is_single_runs(solver: str, network: str) -> None:
    x = noise(3, 2, 2, 2)
    together = run(make(solver, network), 7, x, [seed(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(run(make(solver, network), 7, x[i : i + 1], seed(i)), together[i : i + 1])
        assert torch.equal(run(make(solver, network), 7, x[i : i + 1], [seed(i)]), together[i : i + 1])
    assert relative(together[0], together[1]) > 1e-3


@pytest.mark.parametrize("kind", ["float", "tensor", "double"])
@pytest.mark.parametrize("network", PATHS)
@EVERY
def test_timestep_may_be_a_number(solver: str, network: str, kind: str) -> None:
    """Stages may be called at a time that was called before, and that is no reason to lose the place."""
    form = {"float": float, "tensor": lambda t: t.clone(), "double": lambda t: t.double()}[kind]
    for n in (6, 7):
        scheduler, x = make(solver, network), noise(1, 2, 2, 2)
        scheduler.set_timesteps(n)
        generator = seed()
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, form(t))
            x = scheduler.step(smooth(seen, t), form(t), x, generator, return_dict=False)[0]
        assert torch.equal(x, run(make(solver, network), n, noise(1, 2, 2, 2)))


@EVERY
def test_wrong_timestep_is_refused_also_where_levels_repeat(solver: str) -> None:
    scheduler, x = make(solver), noise(1, 2, 2, 2)
    scheduler.set_timesteps(6)
    t = scheduler.timesteps
    for i in range(6):
        wrong: list[Any] = [t[j] for j in range(6) if j != i]
        wrong += [float(t[j]) for j in range(6) if abs(t[j] - t[i]) > 2]
        for other in wrong if i else []:  # the first one says where the run begins
            with pytest.raises(ValueError, match="each step is made once and in order"):
                scheduler.step(x, other, x, seed())
        scheduler.step(x, t[i], x, seed())


@pytest.mark.parametrize("solver", [name for name in SOLVERS if is_singlestep(SOLVERS[name])])
def test_noise_is_added_at_the_level_of_a_stage(solver: str) -> None:
    for network in PATHS:
        scheduler = make(solver, network)
        scheduler.set_timesteps(9)
        for i, t in enumerate(scheduler.timesteps):
            noisy = scheduler.add_noise(X0, noise(*X0.shape, seed=2).double(), t[None])
            assert relative(noisy, at_level(scheduler, i)) < 1e-6, (network, i)
