"""Every solver with every option of a run: its end, its start, strength, given levels, few and very many calls."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import diffaccel
from diffaccel import SolverScheduler
from diffaccel.samplers.catalog import SOLVERS
from diffaccel.samplers.plan import is_singlestep
from diffaccel.samplers.request import strength_calls
from tests.samplers.analytic import exact, x0_prediction
from tests.samplers.point_mass import NETWORKS, at_level, level, samples
from tests.tiny import relative

EVERY = pytest.mark.parametrize("solver", SOLVERS)
PATHS = ("epsilon", "edm", "flow")
STAGED = {name: rule.stages for name, rule in SOLVERS.items() if is_singlestep(rule)}
CORRECTABLE = [name for name, rule in SOLVERS.items() if not is_singlestep(rule) and rule.can_correct]
ON_EPS = [  # exponential integrators of eps: see test_edge_defects.py
    name for name in CORRECTABLE if SOLVERS[name].memory == "epsilon" and name != "accelerated_ddim"
]
DETERMINISTIC = [name for name in CORRECTABLE if not SOLVERS[name].stochastic]


def make(solver: str, network: str = "epsilon", **options: Any) -> SolverScheduler:
    return diffaccel.scheduler(solver, NETWORKS[network], **options)


def check(scheduler: SolverScheduler, n: int, begin: int = 0) -> None:
    """A run of `n` calls in all gives the one picture back, with the noise of its last level."""
    assert len(scheduler.timesteps) == n
    generator = torch.Generator().manual_seed(0)
    seen = samples(scheduler, at_level(scheduler, begin), generator, begin)
    assert scheduler.step_index == n
    alpha, sigma = level(scheduler, n)
    end = relative(seen[-1], at_level(scheduler, n))
    # From noise of 3e9 sigma / alpha, at the start of flow models, even float64 keeps some digits only.
    exact_to = 1e-4 if scheduler.schedule.path == "flow" and scheduler.solver.memory == "epsilon" else 1e-5
    # Noise drawn anew has the size of sigma, here in eight numbers.
    allowed = 4 * sigma / math.hypot(alpha, sigma) if scheduler.solver.stochastic else 0
    assert end < exact_to + allowed
    if not scheduler.solver.stochastic:
        for i, x in enumerate(seen[:-1], begin):
            assert relative(x, at_level(scheduler, i)) < exact_to, i


def refused(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call()
    message = str(caught.value)
    assert not re.search(r"\. [A-Z]|\.$|\n", message)


@pytest.mark.parametrize("network", PATHS)
@EVERY
def test_last_call_may_correct(solver: str, network: str) -> None:
    scheduler = make(solver, network, final="corrector")
    scheduler.set_timesteps(1)  # there is no step to redo: the run goes to zero
    check(scheduler, 1)
    for n in (2, 3, 8, 20):
        if solver not in CORRECTABLE:
            refused(lambda n=n: scheduler.set_timesteps(n), "final='corrector' needs a")
            continue
        scheduler.set_timesteps(n)
        assert scheduler.grid.lambdas[-1] == scheduler.grid.lambdas[-2]
        if solver in ON_EPS and SOLVERS[solver].stochastic:
            continue
        check(scheduler, n)
        for begin in (1, n - 1):
            scheduler.set_timesteps(n)
            scheduler.set_begin_index(begin)
            check(scheduler, n, begin)


def mixture_error(solver: str, schedule: str, final: str, n: int = 8) -> float:
    """Error of a run at its end, against the exact solution there, over eight starts from pure noise."""
    scheduler = make(solver, "sample", schedule=schedule, final=final)
    errors = []
    for y in np.random.default_rng(7).normal(size=(8, 4)) * 14.65:
        scheduler.set_timesteps(n)
        lam = scheduler.grid.lambdas
        x = torch.from_numpy(y[None] * scheduler.schedule.alpha_sigma(lam[0])[0])
        for i, t in enumerate(scheduler.timesteps):
            alpha = scheduler.schedule.alpha_sigma(lam[i])[0]
            x0 = torch.from_numpy(x0_prediction(x.numpy()[0] / alpha, lam[i])[None])
            x = scheduler.step(x0, t, x, return_dict=False)[0]
        truth = exact(y, np.array([lam[0], min(lam[-1], 8.0)]))[-1]  # the picture does not change beyond
        errors.append(np.abs(x.numpy()[0] / scheduler.schedule.alpha_sigma(lam[-1])[0] - truth).max())
    assert len(scheduler.timesteps) == n
    return float(np.mean(errors))


@pytest.mark.parametrize("schedule", ["logsnr", "karras"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "res_2m", "deis_tab2"])
def test_corrected_end_is_no_worse_than_a_step_to_zero(solver: str, schedule: str) -> None:
    """Eight calls, of which the last corrects a step or is the picture. Grids even in time are not like that."""
    assert mixture_error(solver, schedule, "corrector") <= mixture_error(solver, schedule, "zero")


@pytest.mark.parametrize("network", PATHS)
@EVERY
def test_singlestep_start(solver: str, network: str) -> None:
    scheduler = make(solver, network, start="singlestep")
    if solver not in DETERMINISTIC:
        refused(lambda: scheduler.set_timesteps(8), "start='singlestep'")
        return
    for n in (1, 2, 3, 4, 8, 20):
        for begin in {0, n // 2, n - 1}:
            if solver in ON_EPS and network == "flow" and begin == 0:
                continue
            scheduler.set_timesteps(n)
            scheduler.set_begin_index(begin)
            check(scheduler, n, begin)


@pytest.mark.parametrize("network", PATHS)
@EVERY
def test_dual_fast(solver: str, network: str) -> None:
    """Predictions that agree are not changed by mixing them; those that noise parts are, see test_edge_defects.py."""
    if solver in STAGED:
        refused(lambda: make(solver, network, dual_fast=0.5), "dual_fast mixes in an earlier prediction")
        return
    if solver in ON_EPS and SOLVERS[solver].stochastic:
        refused(lambda: make(solver, network, dual_fast=0.5), "dual_fast would mix eps of different noise")
        return
    ends = ["zero", "sigma_min"] + (["corrector"] if solver in CORRECTABLE else [])
    for final in ends:
        scheduler = make(solver, network, dual_fast=0.5, final=final)
        for n in (1, 2, 3, 8):
            for begin in {0, n - 1}:
                scheduler.set_timesteps(n)
                scheduler.set_begin_index(begin)
                check(scheduler, n, begin)


@pytest.mark.parametrize("network", PATHS)
@EVERY
def test_strength_begins_at_its_level(solver: str, network: str) -> None:
    for strength in (0.3, 0.6):
        scheduler = make(solver, network, schedule="trailing", strength=strength)
        for n in (7, 10):
            calls = strength_calls(scheduler.schedule.path, n, strength)
            scheduler.set_timesteps(n)
            scheduler.set_begin_index(n - calls)
            top = scheduler.schedule.truncated(strength).lambdas[-1]
            shift = math.log(3) if network == "flow" else 0
            assert scheduler.grid.lambdas[n - calls] == pytest.approx(top - shift, abs=1e-6)
            check(scheduler, n, n - calls)
            refused(lambda s=scheduler, b=n - calls - 1: s.set_begin_index(b), "give both the same strength|between")


@pytest.mark.parametrize("network", PATHS)
@EVERY
def test_given_levels(solver: str, network: str) -> None:
    """Between them a solver of several stages makes its steps, with more calls; on flow paths, one call a level."""
    scheduler = make(solver, network)
    sigmas = [0.98, 0.6, 0.31, 0.05]
    given: list[dict[str, Any]] = [{"sigmas": sigmas}, {"sigmas": [*sigmas, 0.0]}]
    if network == "epsilon" or (network == "flow" and solver not in STAGED):
        given.append({"timesteps": [900.0, 700.5, 400.0, 32.0]})
    for arguments in given:
        scheduler.set_timesteps(**arguments)
        n = len(scheduler.timesteps)
        starts = [float(scheduler.sigmas[i]) for i in scheduler.grid.starts()]
        if network != "flow":
            at = scheduler.schedule.lambda_at([900.0, 700.5, 400.0, 32.0])
            levels = arguments.get("sigmas", scheduler.schedule.sigma_at(at))
            assert starts == pytest.approx(list(levels)[:4], rel=1e-5)
            assert n == 4 if solver not in STAGED else n >= 4
        elif "sigmas" in arguments:
            assert n == 4
            assert starts[0] == pytest.approx(3 * 0.98 / (1 + 2 * 0.98), rel=1e-5)
        check(scheduler, n)
    with pytest.raises(ValueError, match="num_inference_steps is 99"):
        scheduler.set_timesteps(99, sigmas=sigmas)


@pytest.mark.parametrize("network", PATHS)
@pytest.mark.parametrize(
    "solver", ["ddim", "dpmpp_3m", "unipc_3", "deis_tab3", "er_sde_3", "heun", "deis_rho4rk", "dpmpp_3s", "seeds_3"]
)
def test_as_few_and_as_many_calls_as_timesteps(solver: str, network: str) -> None:
    config = {**NETWORKS[network], "num_train_timesteps": 60}
    scheduler = diffaccel.scheduler(solver, config)
    for n in (1, 59, 60):
        scheduler.set_timesteps(n)
        check(scheduler, n)
    refused_n = 61 if solver not in STAGED else 60 * STAGED[solver] + 1
    with pytest.raises(ValueError, match="steps must be between 1 and the 60 training timesteps"):
        scheduler.set_timesteps(refused_n)


@pytest.mark.parametrize("solver", ["unipc", "dpmpp_2m_sde", "heun", "accelerated_ddpm"])
def test_a_thousand_calls(solver: str) -> None:
    scheduler = make(solver)
    scheduler.set_timesteps(1000)
    check(scheduler, 1000)
