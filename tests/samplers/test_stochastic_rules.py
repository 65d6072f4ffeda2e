"""Stochastic solvers against the printed algorithms with given noises, through the scheduler itself."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from diffaccel import SolverScheduler
from diffaccel.samplers.ancestral import ancestral
from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.exponential_runge_kutta import ExponentialRungeKutta
from diffaccel.samplers.runge_kutta import RungeKutta
from diffaccel.samplers.sa import SASolver
from diffaccel.samplers.solver import Node
from diffaccel.samplers.solvers import SOLVERS
from tests.samplers.levels import SCHEDULES, apply, nodes, of_ve_sigma, random_nodes
from tests.samplers.test_runge_kutta_rules import Y, field, scheduler_on, states

PATHS = pytest.mark.parametrize("path", SCHEDULES)
SIGMAS = {"vp": [9.0, 4.0, 1.1, 0.3], "ve": [60.0, 4.0, 1.1, 0.05], "flow": [0.97, 0.7, 0.4, 0.12]}
NOISES = np.random.default_rng(7).normal(size=(40, 4))


def phi2(z: float) -> float:
    """ComfyUI's phi2h, of a negative z."""
    return (math.expm1(z) - z) / z


@pytest.fixture
def given_noise(monkeypatch):
    """Let the scheduler draw NOISES, one a call."""
    drawn = iter(NOISES)
    monkeypatch.setattr(
        "diffaccel.samplers.scheduler.randn_tensor", lambda shape, **_: torch.from_numpy(next(drawn)).reshape(shape)
    )


def levels(path: str) -> list[Node]:
    return nodes(path, SCHEDULES[path].lambda_of_sigma(SIGMAS[path]))


def x0_field(y: np.ndarray, s: float) -> np.ndarray:
    """x0 prediction in y = x / alpha, s = sigma / alpha, that `field` as eps stands for."""
    return y - s * field(y, s)


def run(path: str, **options) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """y before each call and at the end, the network's eps being `field` of (y, sigma / alpha); calls a step."""
    scheduler = scheduler_on(path, SIGMAS[path], **options)
    lam = scheduler.grid.lambdas
    if path != "flow":
        return states(scheduler, Y), scheduler.grid.stages
    alpha = [scheduler.schedule.alpha_sigma(v)[0] for v in lam]

    def velocity(x: np.ndarray, sigma: float) -> np.ndarray:
        y, s = x / (1 - sigma), sigma / (1 - sigma)
        return field(y, s) - x0_field(y, s)

    found = states(scheduler, Y * alpha[0], velocity)
    return [x / a for x, a in zip(found, alpha, strict=True)], scheduler.grid.stages


@PATHS
@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("stages", [2, 3])
def test_seeds_is_comfyui_s_loop(stages, eta, path, given_noise):
    """`sample_seeds_2` and `_3`: x0 form, noise of the segments carried on by exp((r - 1) h eta) and so forth."""
    calls, (found, counts) = iter(NOISES), run(path, solver=f"seeds_{stages}", eta=eta)
    assert counts == (*[stages] * 3, 1)
    known, y, seen = levels(path), Y, []
    for now, after in pairwise(known):
        h, r = after.lam - now.lam, [j / stages for j in range(stages + 1)]
        s = [math.exp(-(now.lam + q * h)) for q in r]  # sigma / alpha; alpha is 1 in y
        h_eta, d, noise, start = h * (1 + eta), [], np.zeros(4), y
        for j in range(stages):
            seen.append(y)
            d.append(x0_field(y, s[j]))
            # Noise so far decays, that of the new segment comes on top; in units of sigma.
            part = (r[j + 1] - r[j]) * h * eta
            noise = noise * math.exp(-part) + math.sqrt(-math.expm1(-2 * part)) * next(calls)
            if j == 0:
                past = -math.expm1(-r[1] * h_eta) * d[0]
            elif stages == 2:
                past = -math.expm1(-h_eta) * (d[0] + 1.0 * (d[1] - d[0]))  # lerp by 1 / (2 r) = 1
            elif j == 1:
                a32 = 2 * phi2(-r[2] * h_eta)
                past = -(math.expm1(-r[2] * h_eta) - a32) * d[0] - a32 * d[1]
            else:
                b3 = phi2(-h_eta) / r[2]
                past = -(math.expm1(-h_eta) - b3) * d[0] - b3 * d[2]
            y = s[j + 1] / s[0] * math.exp(-r[j + 1] * h * eta) * start + past + s[j + 1] * noise
    seen.append(y)
    np.testing.assert_allclose(found[:-1], seen, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[-1], x0_field(y, known[-1].ve_sigma), rtol=1e-6, atol=1e-7)


def noise_of_stages(solver: ExponentialRungeKutta, start: Node, end: Node) -> np.ndarray:
    """(stages, stages) lower triangle: how much of each of the drawn noises is in each stage, x0 and y being 0."""
    now, out = np.zeros(solver.stages), []
    for j, row in enumerate(solver.rows([start, end], 0, solver.stages)):
        now = row.x * now
        now[j] += row.noise
        out.append(now)
    return np.array(out)


@PATHS
@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_lie_on_one_path_of_the_noise(stages, prediction, eta, path):
    """Covariance of an Ornstein-Uhlenbeck path (x0 kept) or a Brownian one in sigma^2 (eps kept)."""
    start, end = nodes(path, [-0.4, 0.9])
    solver = ExponentialRungeKutta(stages, prediction, eta=eta)
    calls = [*solver.inner([start, end], 0, stages), end]
    h = np.array([n.lam - start.lam for n in calls])
    s = np.array([n.ve_sigma for n in calls])
    variance = s**2 * -np.expm1(-2 * eta * h) if prediction == "x0" else eta * (start.ve_sigma**2 - s**2)
    decay = np.exp(-(1 + eta) * np.abs(h[:, None] - h)) if prediction == "x0" else np.ones((stages, stages))
    mixed = noise_of_stages(solver, start, end)
    expected = np.minimum.outer(np.arange(stages), np.arange(stages))
    np.testing.assert_allclose(mixed @ mixed.T, variance[expected] * decay, rtol=1e-12)


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_noise_of_a_step_does_not_depend_on_its_stages(eta, prediction):
    start, end = nodes("vp", [-0.4, 0.9])
    one = ExponentialAdams(1, eta=eta, prediction=prediction).predict(end, [start], 1).noise
    for stages in (2, 3):
        mixed = noise_of_stages(ExponentialRungeKutta(stages, prediction, eta=eta), start, end)
        assert math.sqrt((mixed[-1] ** 2).sum()) == pytest.approx(one, rel=1e-12)
    if prediction == "x0":
        assert one == pytest.approx(end.ve_sigma * math.sqrt(1 - math.exp(-2 * eta * (end.lam - start.lam))))


def ancestral_step(sigma_from: float, sigma_to: float, eta: float) -> tuple[float, float]:
    """k-diffusion's `get_ancestral_step`: (sigma_down, sigma_up)."""
    up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


Advance = Callable[[np.ndarray, float, float], tuple[np.ndarray, list[np.ndarray]]]


def euler(y: np.ndarray, s: float, down: float) -> tuple[np.ndarray, list[np.ndarray]]:
    return y + (down - s) * field(y, s), [y]


def dpm_2s(y: np.ndarray, s: float, down: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """k-diffusion's `sample_dpm_2_ancestral`: the middle in log sigma."""
    middle = math.sqrt(s * down)
    stage = y + (middle - s) * field(y, s)
    return y + (down - s) * field(stage, middle), [y, stage]


def dpmpp_2s(y: np.ndarray, s: float, down: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """k-diffusion's `sample_dpmpp_2s_ancestral`."""
    h, middle = math.log(s / down), math.sqrt(s * down)
    stage = middle / s * y - math.expm1(-h / 2) * x0_field(y, s)
    return down / s * y - math.expm1(-h) * x0_field(stage, middle), [y, stage]


@PATHS
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(
    ("name", "field_name", "advance"),
    [
        ("euler_ancestral", "eta", euler),
        ("dpm_2s_ancestral", "ancestral", dpm_2s),
        ("dpmpp_2s_ancestral", "ancestral", dpmpp_2s),
    ],
)
def test_ancestral_samplers_are_k_diffusion_s(name, field_name, advance: Advance, eta, path, given_noise):
    """In sigma / alpha on every path. The noise of a step is that of its last call."""
    found, counts = run(path, solver=name, **{field_name: eta})
    y, seen, call = Y, [], 0
    s = [n.ve_sigma for n in levels(path)]
    for now, after in pairwise(s):
        down, up = ancestral_step(now, after, eta)
        y, stages = advance(y, now, down)
        seen, call = [*seen, *stages], call + len(stages)
        y = y + up * NOISES[call - 1]
    assert sum(counts) == call + 1
    np.testing.assert_allclose(found[:-1], [*seen, y], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[-1], x0_field(y, s[-1]), rtol=1e-6, atol=1e-7)


def test_ancestral_noise_is_at_most_all_of_it():
    start, end = of_ve_sigma("ve", [2.0, 1.0])
    assert ancestral(start, end, 5.0).ve_sigma < 1e-7
    assert ancestral(start, end, 0.0).ve_sigma == pytest.approx(1.0)
    assert ancestral(start, end, 1.0).ve_sigma == pytest.approx(ancestral_step(2.0, 1.0, 1.0)[0])


@pytest.mark.parametrize("path", ["vp", "ve"])
@pytest.mark.parametrize(("s_tmin", "s_tmax"), [(0.0, math.inf), (0.5, 2.0)])
@pytest.mark.parametrize("s_churn", [0.8, 40.0])
def test_edm_stochastic_is_algorithm_2_on_the_raised_levels(s_churn, s_tmin, s_tmax, path, given_noise):
    """EDM, algorithm 2, whose t-hat are our levels: t_i = level / (1 + gamma) but for the first, already noised."""
    found, counts = run(path, solver="edm_stochastic", s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=1.003)
    assert counts == (2, 2, 2, 1)
    t_hat, steps = SIGMAS[path], len(SIGMAS[path])
    gamma = min(s_churn / steps, math.sqrt(2) - 1)
    t = [v / (1 + gamma) if s_tmin <= v <= s_tmax else v for v in t_hat]
    y, seen, call = Y, [], 0
    for i in range(steps):
        if i:  # raise the noise from t_i to t-hat_i
            y = y + math.sqrt(max(0.0, t_hat[i] ** 2 - t[i] ** 2)) * 1.003 * NOISES[call - 1]
        d = field(y, t_hat[i])
        seen.append(y)
        if i == steps - 1:
            y = y - t_hat[i] * d
            break
        stage = y + (t[i + 1] - t_hat[i]) * d
        seen.append(stage)
        y = y + (t[i + 1] - t_hat[i]) * (d + field(stage, t[i + 1])) / 2
        call += 2
    np.testing.assert_allclose(found, [*seen, y], rtol=1e-6, atol=1e-7)


def test_edm_stochastic_without_churn_is_heun():
    levels_ = of_ve_sigma("ve", [4.0, 1.1, 0.0])
    quiet = RungeKutta("heun", s_churn=0.0)
    assert quiet.rows(levels_, 0, 2) == RungeKutta("heun").rows(levels_, 0, 2)
    noisy = RungeKutta("heun", s_churn=1.0, s_tmin=2.0).rows(levels_, 0, 2)  # both levels below are out of the range
    assert noisy == quiet.rows(levels_, 0, 2)


def sa_weights(start: Node, end: Node, points: list[Node], tau2: float) -> list[float]:
    """b_j of SA-Solver in y: (1 + tau^2) int exp(-(1 + tau^2) (lambda_end - u)) L_j(u) du by quadrature."""
    out = []
    for p in points:

        def integrand(u: float, p: Node = p) -> float:
            basis = math.prod((u - q.lam) / (p.lam - q.lam) for q in points if q is not p)
            return (1 + tau2) * math.exp(-(1 + tau2) * (end.lam - u)) * basis

        out.append(quad(integrand, start.lam, end.lam, epsabs=1e-13, epsrel=1e-11)[0])
    return out


@PATHS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_sa_solver_predicts_and_corrects_with_the_same_noise(points, eta, path):
    """Algorithm 1: the corrector starts again from the sample before the step, with the predictor's noise."""
    *known, end = random_nodes(path, points + 1, 1)
    known = known[::-1]
    solver = SASolver(eta=eta, noise_start=1.0, noise_end=0.0)
    y, z, m_end, *m = np.random.default_rng(2).normal(size=3 + points).tolist()
    h = end.lam - known[0].lam
    rest = math.exp(-(1 + eta) * h) * y + end.ve_sigma * math.sqrt(-math.expm1(-2 * eta * h)) * z
    step = apply(solver.predict(end, known, points), y, m, noise=z)
    redone = apply(solver.correct(end, known, known[0], points), step, [m_end, *m], anchor=y)
    assert step == pytest.approx(rest + float(np.dot(sa_weights(known[0], end, known, eta), m)), rel=1e-9)
    printed = rest + float(np.dot(sa_weights(known[0], end, [end, *known], eta), [m_end, *m]))
    assert redone == pytest.approx(printed, rel=1e-9)
    assert solver.correct(end, known, known[0], points).noise == 0


@PATHS
def test_sa_solver_without_noise_is_unipc_with_exact_weights(path):
    *known, end = random_nodes(path, 4, 3)
    known = known[::-1]
    quiet, unipc = SASolver(eta=0.0), ExponentialAdams(3, corrector=True)
    assert quiet.predict(end, known, 3) == unipc.predict(end, known, 3)
    assert quiet.correct(end, known, known[0], 3) == unipc.correct(end, known, known[0], 3)


@PATHS
def test_sa_solver_is_noisy_in_the_middle_of_the_training_time(path):
    """From 20 % to 80 % of the time: of timesteps on VP and flow paths, of EDM's log sigma on VE paths."""
    solver, schedule = SOLVERS["sa_solver"], SCHEDULES[path]
    assert isinstance(solver, SASolver)
    times = schedule.times[0] + (schedule.times[-1] - schedule.times[0]) * np.array(
        [0.05, 0.19, 0.21, 0.5, 0.79, 0.81, 0.99]
    )
    at = nodes(path, schedule.lambda_at(times))
    assert [solver.eta_at(n) for n in at] == [0, 0, 1, 1, 1, 0, 0]
    for start in at:
        end = Node(start.lam + 0.3, schedule)
        eta = solver.eta_at(start)
        row = solver.predict(end, [start], 1)
        assert row.noise == pytest.approx(end.ve_sigma * math.sqrt(-math.expm1(-0.6 * eta)))
        assert row.x == pytest.approx(math.exp(-0.3 * (1 + eta)))


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_sa_solver_run_is_the_naive_loop(path, given_noise):
    """Through the scheduler: each step by its own tau, that of where it starts, in both predictor and corrector."""
    found, _ = run(path, solver="sa_solver")
    known, solver = levels(path), SASolver()
    y, begin, z, m = Y, Y, np.zeros(4), []
    seen = []
    draws = iter(NOISES)
    for i, now in enumerate(known):
        seen.append(y)
        m = [x0_field(y, now.ve_sigma), *m]
        if i:
            used = min(3, i, len(known) - i + 1)
            eta, h = solver.eta_at(known[i - 1]), now.lam - known[i - 1].lam
            w = sa_weights(known[i - 1], now, known[i::-1][: used + 1], eta)
            y = math.exp(-(1 + eta) * h) * begin + sum(v * x for v, x in zip(w, m, strict=False))
            y = y + now.ve_sigma * math.sqrt(-math.expm1(-2 * eta * h)) * z
        begin, z = y, next(draws)
        if i == len(known) - 1:
            y = m[0]
            break
        eta, h = solver.eta_at(now), known[i + 1].lam - now.lam
        w = sa_weights(now, known[i + 1], known[i::-1][: min(3, i + 1, len(known) - i)], eta)
        y = math.exp(-(1 + eta) * h) * y + sum(v * x for v, x in zip(w, m, strict=False))
        y = y + known[i + 1].ve_sigma * math.sqrt(-math.expm1(-2 * eta * h)) * z
    assert {solver.eta_at(n) for n in known} == {0.0, 1.0}
    np.testing.assert_allclose(found, [*seen, y], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("network", ["vp", "svd", "edm", "flow"])
def test_sa_solver_is_noisy_in_the_middle_on_every_clock(network):
    """SVD is a VP network whose clock is log sigma."""
    configs = {
        "vp": {},
        "svd": {
            "timestep_type": "continuous",
            "sigma_min": 0.002,
            "sigma_max": 700.0,
            "prediction_type": "v_prediction",
        },
        "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
        "flow": {"prediction_type": "flow_prediction"},
    }
    scheduler = SolverScheduler(**configs[network], solver_options={"solver": "sa_solver", "schedule": "linspace"})
    scheduler.set_timesteps(20)
    noisy = [step.predict.noise > 0 for step in scheduler._plan]
    assert 8 <= sum(noisy) <= 14
    assert not noisy[0]
    assert not noisy[-1]
