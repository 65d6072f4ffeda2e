"""One order test for every solver, now and later, on every path."""

import numpy as np
import pytest
import torch

from diffaccel import SolverScheduler
from diffaccel.samplers.solver import SOLVERS
from tests.samplers.analytic import exact, run, slope

PATHS = {
    "vp": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "flow": {"prediction_type": "flow_prediction"},
}
CLIPPED = {"lambda_min_clipped": -1.0}
STEPS = [80, 160, 320]
ODE = [name for name, solver in SOLVERS.items() if not solver.eta]
SDE = [name for name, solver in SOLVERS.items() if solver.eta]


def scheduler_for(name: str, path: str = "vp", keys: dict | None = None, **options) -> SolverScheduler:
    options = {"solver": name, "lower_final": 0, **({"schedule": "flow"} if path == "flow" else {}), **options}
    scheduler = SolverScheduler(**PATHS[path], **(keys or {}), solver_options=options)
    scheduler.register_to_config(prediction_type="sample")  # the problem gives x0 itself, on either path
    return scheduler


def nodes(n: int, even: bool) -> np.ndarray:
    """n + 1 half log-SNR nodes from sigma 8 to 0.06; uneven ones change their step smoothly by a factor of 3."""
    u = np.linspace(0, 1, n + 1)
    return -np.log(8.0) + (np.log(8.0) - np.log(0.06)) * (u if even else u + 0.08 * np.sin(2 * np.pi * u))


def errors(name: str, path: str, even: bool, start_values: int, **options) -> list[float]:
    y = np.array([3.0, -5.0, 4.0, 1.0])
    out = []
    for n in STEPS:
        scheduler, lam = scheduler_for(name, path, **options), nodes(n, even)
        scheduler.set_timesteps(sigmas=scheduler.schedule.sigma_at(lam))
        truth = exact(y, lam)
        out.append(np.abs(run(scheduler, y, truth[:start_values]) - truth[-1]).max())
    return out


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ODE)
def test_order_matches_declared_from_exact_start(name, path, even):
    solver = SOLVERS[name]
    observed = slope(errors(name, path, even, start_values=solver.order + solver.corrector), STEPS)
    assert observed >= solver.convergence_order - 0.25


@pytest.mark.parametrize("name", ODE)
def test_order_from_pure_noise_is_at_least_two(name):
    observed = slope(errors(name, "vp", True, start_values=0), STEPS)
    assert observed >= min(SOLVERS[name].convergence_order, 2) - 0.25


def order_from_noise(name: str, schedule: str, start: str) -> float:
    """Observed order from a start at sigma = 2.7, where x0 changes: from sigma = 14.6 the first steps hardly matter."""
    y, observed = np.array([1.5, -2.0, 1.0, 0.5]), []
    for n in STEPS:
        scheduler = scheduler_for(name, "vp", CLIPPED, schedule=schedule, start=start)
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        ends = np.array([scheduler.grid.lambdas[0], scheduler.grid.lambdas[-2]])
        observed.append(np.abs(run(scheduler, y) - exact(y, ends)[-1]).max())
    return slope(observed, STEPS)


@pytest.mark.parametrize("schedule", ["logsnr", "karras"])
@pytest.mark.parametrize("name", ODE)
def test_singlestep_start_restores_declared_order(name, schedule):
    assert order_from_noise(name, schedule, "singlestep") >= SOLVERS[name].convergence_order - 0.25


@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc_3"])
def test_euler_start_costs_an_order(name):
    """What the singlestep start is for; if this fails, the test above proves nothing."""
    assert order_from_noise(name, "logsnr", "euler") < SOLVERS[name].convergence_order - 0.25


def test_shipped_third_order_is_second_order():
    assert slope(errors("dpmpp_3m_shipped", "vp", True, start_values=3), STEPS) < 2.5


@pytest.mark.parametrize("name", SDE)
def test_mean_of_stochastic_solvers_has_declared_order(name):
    """With the noise left out a step must integrate the reverse SDE's drift, dy/dlambda = (1 + eta)(x0 - y)."""
    solver, y, observed = SOLVERS[name], np.array([3.0, -5.0, 4.0, 1.0]), []
    for n in STEPS:
        scheduler, lam = scheduler_for(name), nodes(n, even=True)
        scheduler.set_timesteps(sigmas=scheduler.schedule.sigma_at(lam))
        truth = exact(y, lam, rate=1 + solver.eta)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffaccel.samplers.scheduler.randn_tensor", lambda shape, **_: torch.zeros(shape))
            result = run(scheduler, y, truth[: solver.order])
        observed.append(np.abs(result - truth[-1]).max())
    assert slope(observed, STEPS) >= solver.convergence_order - 0.25


@pytest.mark.parametrize("name", SDE)
def test_stochastic_solvers_keep_the_variance_of_gaussian_data(name):
    """x0 ~ N(0, c^2): after the run the samples must have that variance (20,000 draws, 200 steps)."""
    c, lam = 0.6, nodes(200, even=True)
    scheduler = scheduler_for(name)
    scheduler.set_timesteps(sigmas=scheduler.schedule.sigma_at(lam))
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = scheduler.schedule.alpha_sigma(lam[0])
    x = torch.randn(20000, generator=generator, dtype=torch.float64) * (alpha**2 * c**2 + sigma**2) ** 0.5
    for i, t in enumerate(scheduler.timesteps[:-1]):
        alpha, sigma = scheduler.schedule.alpha_sigma(lam[i])
        x0 = alpha * c**2 * x / (alpha**2 * c**2 + sigma**2)
        x = scheduler.step(x0, t, x, generator=generator, return_dict=False)[0]
    alpha, sigma = scheduler.schedule.alpha_sigma(lam[-1])
    assert float(x.var()) == pytest.approx(alpha**2 * c**2 + sigma**2, rel=0.04)
