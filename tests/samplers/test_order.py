"""One order test for every solver, now and later, on every path."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from diffaccel import SolverScheduler
from diffaccel.samplers.er_sde import ERSDE, NOISE_SCALES
from diffaccel.samplers.plan import is_singlestep
from diffaccel.samplers.solvers import SOLVERS
from tests.samplers.analytic import exact, place, run, slope

PATHS = {
    "vp": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "ve": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
    "flow": {"prediction_type": "flow_prediction"},
}
CLIPPED = {"lambda_min_clipped": -1.0}
EVERYWHERE = {"sa_solver": {"noise_start": 1.0, "noise_end": 0.0}}
STEPS = [160, 320]
ODE = [name for name, solver in SOLVERS.items() if not solver.stochastic]
SDE = [name for name, solver in SOLVERS.items() if solver.stochastic]
MULTISTEP = [name for name in ODE if not is_singlestep(SOLVERS[name]) and SOLVERS[name].can_correct]


def steps_for(name: str, path: str = "vp") -> list[int]:
    """Step counts that show the order; the clock of a table of 1000 timesteps has kinks, which t-AB sees."""
    return [80, 160] if getattr(SOLVERS[name], "variable", "") == "time" and path == "vp" else STEPS


def declared(name: str) -> int:
    """Order from pure noise with a singlestep start, which restores 4 only for solvers that remember x0."""
    order = SOLVERS[name].convergence_order
    return order if SOLVERS[name].memory == "x0" else min(order, 3)


def scheduler_for(name: str, path: str = "vp", keys: dict | None = None, **options) -> SolverScheduler:
    if "lower_final" in {f.name for f in fields(SOLVERS[name])}:
        options["lower_final"] = 0
    options = {"solver": name, **({"schedule": "flow"} if path == "flow" else {}), **options}
    scheduler = SolverScheduler(**PATHS[path], **(keys or {}), solver_options=options)
    return scheduler


def nodes(n: int, even: bool) -> np.ndarray:
    """n + 1 half log-SNR nodes from sigma 8 to 0.06; uneven ones change their step smoothly by a factor of 3."""
    u = np.linspace(0, 1, n + 1)
    return -np.log(8.0) + (np.log(8.0) - np.log(0.06)) * (u if even else u + 0.08 * np.sin(2 * np.pi * u))


def errors(name: str, path: str, even: bool, start_values: int, **options) -> list[float]:
    y = np.array([3.0, -5.0, 4.0, 1.0])
    out = []
    for n in steps_for(name, path):
        scheduler, lam = scheduler_for(name, path, **options), nodes(n, even)
        place(scheduler, lam)
        truth = exact(y, lam)
        out.append(np.abs(run(scheduler, y, truth[:start_values]) - truth[-1]).max())
    return out


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ODE)
def test_order_matches_declared_from_exact_start(name, path, even):
    solver = SOLVERS[name]
    start_values = 0 if is_singlestep(solver) else solver.order + solver.corrector
    observed = slope(errors(name, path, even, start_values), steps_for(name, path))
    assert observed >= solver.convergence_order - 0.25


@pytest.mark.parametrize("name", ODE)
def test_order_from_pure_noise_is_at_least_two(name):
    observed = slope(errors(name, "vp", True, start_values=0), steps_for(name))
    assert observed >= min(SOLVERS[name].convergence_order, 2) - 0.25


def order_from_noise(name: str, schedule: str, start: str) -> float:
    """Observed order from a start at sigma = 2.7, where x0 changes: from sigma = 14.6 the first steps hardly matter."""
    y, observed = np.array([1.5, -2.0, 1.0, 0.5]), []
    for n in steps_for(name):
        scheduler = scheduler_for(name, "vp", CLIPPED, schedule=schedule, start=start)
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        ends = np.array([scheduler.grid.lambdas[0], scheduler.grid.lambdas[-2]])
        observed.append(np.abs(run(scheduler, y) - exact(y, ends)[-1]).max())
    return slope(observed, steps_for(name))


@pytest.mark.parametrize("schedule", ["logsnr", "karras"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_singlestep_start_restores_declared_order(name, schedule):
    assert order_from_noise(name, schedule, "singlestep") >= declared(name) - 0.25


@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc_3"])
def test_euler_start_costs_an_order(name):
    """What the singlestep start is for; if this fails, the test above proves nothing."""
    assert order_from_noise(name, "logsnr", "euler") < SOLVERS[name].convergence_order - 0.25


def test_shipped_third_order_is_second_order():
    assert slope(errors("dpmpp_3m_shipped", "vp", True, start_values=3), STEPS) < 2.5


def drift_rate(name: str, lam: float) -> float:
    """Rate of the reverse SDE's drift, dy/dlambda = rate * (x0 - y): 1 + eta, or dlog(phi)/dlog(sigma) of ER-SDE."""
    solver = SOLVERS[name]
    if isinstance(solver, ERSDE):
        phi, sigma = NOISE_SCALES[solver.noise_scale], np.exp(-lam)
        return float(np.log(phi(sigma * 1.0001) / phi(sigma * 0.9999)) / np.log(1.0001 / 0.9999))
    return 2.0  # all the others with noise replace it as the reverse SDE does


@pytest.mark.parametrize("name", [n for n in SDE if n != "edm_stochastic"])  # its noise a step depends on their number
def test_mean_of_stochastic_solvers_has_declared_order(name):
    """With the noise left out a step must integrate the reverse SDE's drift."""
    solver, y, observed = SOLVERS[name], np.array([3.0, -5.0, 4.0, 1.0]), []
    start_values = 0 if is_singlestep(solver) else solver.order + solver.corrector
    for n in STEPS:
        scheduler, lam = scheduler_for(name, **EVERYWHERE.get(name, {})), nodes(n, even=True)
        place(scheduler, lam)
        truth = exact(y, lam, rate=lambda v: drift_rate(name, v))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffaccel.samplers.scheduler.randn_tensor", lambda shape, **_: torch.zeros(shape))
            result = run(scheduler, y, truth[:start_values])
        observed.append(np.abs(result - truth[-1]).max())
    assert slope(observed, STEPS) >= solver.convergence_order - 0.25


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SDE)
def test_stochastic_solvers_keep_the_variance_of_gaussian_data(name, path):
    """x0 ~ N(0, c^2): after the run the samples must have that variance (20,000 draws, 200 steps)."""
    c, lam = 0.6, nodes(200, even=True)
    scheduler = scheduler_for(name, path)
    place(scheduler, lam)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator, dtype=torch.float64) * marginal(scheduler, lam[0], c) ** 0.5
    for node, t in zip(scheduler.grid.lambdas[:-1], scheduler.timesteps[:-1], strict=False):
        alpha, sigma = scheduler.schedule.alpha_sigma(node)
        p, q = scheduler._x0_of(node)
        output = (alpha * c**2 * x / (alpha**2 * c**2 + sigma**2) - p * x) / q
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    expected = marginal(scheduler, lam[-1], c)
    if name == "accelerated_ddpm":  # the noise before the last call is in the sample already
        alpha, sigma = scheduler.schedule.alpha_sigma(lam[-1])
        expected += (sigma / alpha) ** 2 / 2 * alpha**2
    assert float(x.var()) == pytest.approx(expected, rel=0.04)


def marginal(scheduler: SolverScheduler, lam: float, c: float) -> float:
    alpha, sigma = scheduler.schedule.alpha_sigma(lam)
    return alpha**2 * c**2 + sigma**2
