"""Each exponential rule against the formula its paper or reference code prints, on random levels and predictions."""

import math

import numpy as np
import pytest

from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.exponential_runge_kutta import ExponentialRungeKutta
from diffaccel.samplers.solver import Node
from diffaccel.samplers.solvers import SOLVERS
from tests.samplers.levels import SCHEDULES, apply, random_nodes

PATHS = pytest.mark.parametrize("path", SCHEDULES)
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
PREDICTIONS = pytest.mark.parametrize("prediction", ["x0", "epsilon"])


def problem(path: str, points: int, seed: int) -> tuple[Node, list[Node], float, list[float]]:
    """Level to go to, levels known (newest first), a sample y at the newest and random predictions, one a level."""
    *known, end = random_nodes(path, points + 1, seed)
    rng = np.random.default_rng(100 + seed)
    return end, known[::-1], float(rng.normal()), rng.normal(size=points).tolist()


def x0_of(node: Node, y: float, prediction: str, m: float) -> float:
    return m if prediction == "x0" else y - node.ve_sigma * m


def sigma_of(node: Node) -> float:
    """Amount of noise in x = alpha x0 + sigma eps."""
    return node.alpha * node.ve_sigma


def printed(end: Node, start: Node, prediction: str) -> tuple[float, float, float, list[float]]:
    """(factor of x, a_t or s_t, sign, [phi1, phi2, phi3]) of 2.1 in the notes, for a step of DPM-Solver(++)."""
    h = end.lam - start.lam
    if prediction == "x0":
        phi1 = math.expm1(-h)
        phi2 = phi1 / h + 1
        return sigma_of(end) / sigma_of(start), end.alpha, 1.0, [phi1, phi2, phi2 / h - 0.5]
    phi1 = math.expm1(h)
    phi2 = phi1 / h - 1
    return end.alpha / start.alpha, sigma_of(end), -1.0, [phi1, phi2, phi2 / h - 0.5]


def dpm_multistep(end, known, x, m, prediction, heun=False, curvature=1.0):
    """DPM-Solver(++) of as many steps as `m` has predictions; `curvature` 1 is printed, 2 of third order."""
    kept, unit, sign, (phi1, phi2, phi3) = printed(end, known[0], prediction)
    h = end.lam - known[0].lam
    first = kept * x - unit * phi1 * m[0]
    if len(m) == 1:
        return first
    r0 = (known[0].lam - known[1].lam) / h
    d10 = (m[0] - m[1]) / r0
    if len(m) == 2:
        return first + (sign * unit * phi2 * d10 if heun else -0.5 * unit * phi1 * d10)
    r1 = (known[1].lam - known[2].lam) / h
    d11 = (m[1] - m[2]) / r1
    d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
    d2 = curvature * (d10 - d11) / (r0 + r1)
    return first + sign * unit * phi2 * d1 - unit * phi3 * d2


@PATHS
@SEEDS
@PREDICTIONS
@pytest.mark.parametrize("rule", ["1", "2M", "2M heun", "3M shipped", "3M exact"])
def test_dpm_solver_multistep(rule, prediction, seed, path):
    points = int(rule[0])
    end, known, y, m = problem(path, points, seed)
    solver = ExponentialAdams(
        order=points,
        second="exact" if rule.endswith("heun") else "midpoint",
        halve_curvature=rule.endswith("shipped"),
        prediction=prediction,
    )
    row = solver.predict(end, known, points)
    ours = end.alpha * apply(row, y, m, x0_of(known[0], y, prediction, m[0]))
    curvature = 1.0 if rule.endswith("shipped") else 2.0
    naive = dpm_multistep(end, known, known[0].alpha * y, m, prediction, rule.endswith("heun"), curvature)
    assert ours == pytest.approx(naive, rel=1e-10, abs=1e-12)
    assert row.noise == 0


@pytest.mark.parametrize("order", [1, 2])
def test_a_third_order_solver_warms_up_with_its_lower_orders(order):
    end, known, y, m = problem("vp", order, 0)
    rows = [SOLVERS[name].predict(end, known, order) for name in ("dpmpp_3m", "dpmpp_3m_shipped", "dpmpp_2m")]
    naive = dpm_multistep(end, known, known[0].alpha * y, m, "x0")
    for row in rows:
        assert end.alpha * apply(row, y, m) == pytest.approx(naive, rel=1e-12)


@PATHS
@SEEDS
@pytest.mark.parametrize("rule", ["1", "2M", "2M heun", "3M", "3M shipped"])
def test_sde_dpm_solver_plus_plus(rule, seed, path):
    """k1, k2 as corrected: what Diffusers prints for 3M has a sign the wrong way round."""
    points = int(rule[0])
    end, known, y, m = problem(path, points, seed)
    h, x, z = end.lam - known[0].lam, known[0].alpha * y, 0.7
    s_t, s_0, a_t, big = sigma_of(end), sigma_of(known[0]), end.alpha, 2 * (end.lam - known[0].lam)
    naive = s_t / s_0 * math.exp(-h) * x + a_t * (1 - math.exp(-big)) * m[0] + s_t * math.sqrt(1 - math.exp(-big)) * z
    k1 = 1 - (1 - math.exp(-big)) / big
    if points == 2:
        d = (m[0] - m[1]) * h / (known[0].lam - known[1].lam)
        naive += a_t * k1 * d if rule.endswith("heun") else 0.5 * a_t * (1 - math.exp(-big)) * d
    if points == 3:
        d1, d2 = divided_differences(known, m, h)
        naive += a_t * k1 * d1 + a_t * (0.5 if rule.endswith("shipped") else 1.0) * (1 - 2 * k1 / big) * d2
    second = "exact" if rule.endswith("heun") else "midpoint"
    solver = ExponentialAdams(order=points, second=second, eta=1.0, halve_curvature=rule.endswith("shipped"))
    assert end.alpha * apply(solver.predict(end, known, points), y, m, noise=z) == pytest.approx(naive, rel=1e-10)


def divided_differences(known, m, h):
    r0, r1 = (known[0].lam - known[1].lam) / h, (known[1].lam - known[2].lam) / h
    d10, d11 = (m[0] - m[1]) / r0, (m[1] - m[2]) / r1
    return d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)


@PATHS
@SEEDS
@pytest.mark.parametrize("rule", ["1", "2M", "2M heun", "3M", "3M shipped"])
def test_sde_dpm_solver_on_noise(rule, seed, path):
    points = int(rule[0])
    end, known, y, m = problem(path, points, seed)
    h, x, z = end.lam - known[0].lam, known[0].alpha * y, -1.3
    s_t = sigma_of(end)
    naive = end.alpha / known[0].alpha * x - 2 * s_t * math.expm1(h) * m[0] + s_t * math.sqrt(math.expm1(2 * h)) * z
    q1 = math.expm1(h) / h - 1
    if points == 2:
        d = (m[0] - m[1]) * h / (known[0].lam - known[1].lam)
        naive -= 2 * s_t * q1 * d if rule.endswith("heun") else s_t * math.expm1(h) * d
    if points == 3:
        d1, d2 = divided_differences(known, m, h)
        q2 = (0.5 if rule.endswith("shipped") else 1.0) * (2 * q1 / h - 1)
        naive -= 2 * s_t * (q1 * d1 + q2 * d2)
    second = "exact" if rule.endswith("heun") else "midpoint"
    solver = ExponentialAdams(
        order=points, second=second, eta=1.0, prediction="epsilon", halve_curvature=rule.endswith("shipped")
    )
    row = solver.predict(end, known, points)
    ours = end.alpha * apply(row, y, m, x0_of(known[0], y, "epsilon", m[0]), noise=z)
    assert ours == pytest.approx(naive, rel=1e-10)


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.5])
def test_eta_is_that_of_k_diffusion(eta):
    """`sample_dpmpp_2m_sde`: e^(-eta h) in the factor of x, h (1 + eta) in the weights, 1 - e^(-2 eta h) of noise."""
    end, known, y, m = problem("ve", 2, 5)
    h, z = end.lam - known[0].lam, 0.4
    eta_h, r = eta * h, (known[0].lam - known[1].lam) / h
    naive = end.ve_sigma / known[0].ve_sigma * math.exp(-eta_h) * y - math.expm1(-h - eta_h) * m[0]
    naive += -0.5 * math.expm1(-h - eta_h) / r * (m[0] - m[1]) + end.ve_sigma * math.sqrt(-math.expm1(-2 * eta_h)) * z
    row = ExponentialAdams(order=2, second="midpoint", eta=eta).predict(end, known, 2)
    assert apply(row, y, m, noise=z) == pytest.approx(naive, rel=1e-12)


def staged(solver: ExponentialRungeKutta, start: Node, end: Node, y: float, m: list[float]) -> list[float]:
    """y after each row of the step, for predictions `m` in the order of the calls."""
    out, calls = [], [start, *solver.inner([start, end], 0, solver.stages)]
    now = y
    for j, row in enumerate(solver.rows([start, end], 0, solver.stages)):
        now = apply(row, now, m[j::-1], x0_of(calls[j], now, solver.prediction, m[j]), anchor=y)
        out.append(now)
    return out


@PATHS
@SEEDS
@PREDICTIONS
@pytest.mark.parametrize("second", ["midpoint", "exact"])
def test_dpm_solver_2s(second, prediction, seed, path):
    end, (start, _), y, m = problem(path, 2, seed)
    solver = ExponentialRungeKutta(2, prediction, second)
    (middle,) = solver.inner([start, end], 0, 2)
    assert middle.lam == pytest.approx((start.lam + end.lam) / 2)
    x = start.alpha * y
    kept, unit, sign, (phi1, phi2, _) = printed(end, start, prediction)
    first = dpm_multistep(middle, [start], x, m[:1], prediction)
    change = (m[1] - m[0]) / 0.5
    last = (
        kept * x
        - unit * phi1 * m[0]
        + (sign * unit * phi2 * change if second == "exact" else -0.5 * unit * phi1 * change)
    )
    ours = staged(solver, start, end, y, m)
    assert [middle.alpha * ours[0], end.alpha * ours[1]] == pytest.approx([first, last], rel=1e-10)


@PATHS
@SEEDS
@PREDICTIONS
def test_dpm_solver_3s(prediction, seed, path):
    end, (start, *_), y, m = problem(path, 3, seed)
    solver = ExponentialRungeKutta(3, prediction)
    s1, s2 = solver.inner([start, end], 0, 3)
    x, h = start.alpha * y, end.lam - start.lam
    assert [s1.lam - start.lam, s2.lam - start.lam] == pytest.approx([h / 3, 2 * h / 3])
    x1 = dpm_multistep(s1, [start], x, m[:1], prediction)
    kept, unit, sign, (phi12, phi22, _) = printed(s2, start, prediction)
    x2 = kept * x - unit * phi12 * m[0] + sign * 2 * unit * phi22 * (m[1] - m[0])
    kept, unit, sign, (phi1, phi2, _) = printed(end, start, prediction)
    x3 = kept * x - unit * phi1 * m[0] + sign * 1.5 * unit * phi2 * (m[2] - m[0])
    alphas = np.array([s1.alpha, s2.alpha, end.alpha])
    assert (alphas * staged(solver, start, end, y, m)).tolist() == pytest.approx([x1, x2, x3], rel=1e-10)


def unipc(end, known, x, m, m_end, prediction, bh):
    """(x_t, x_c) of 2.2 in the notes, with p = len(m) points before the new one."""
    p, h = len(m), end.lam - known[0].lam
    kept, unit, _, _ = printed(end, known[0], prediction)
    r = np.array([(n.lam - known[0].lam) / h for n in known[1:]] + [1.0])
    d = np.array([(v - m[0]) / q for v, q in zip(m[1:], r[:-1], strict=True)])
    hh = -h if prediction == "x0" else h
    big = hh if bh == "bh1" else math.expm1(hh)
    big_r, b, h_phi, factorial = [], [], math.expm1(hh) / hh - 1, 1
    for i in range(1, p + 1):
        big_r.append(r ** (i - 1))
        b.append(h_phi * factorial / big)
        factorial *= i + 1
        h_phi = h_phi / hh - 1 / factorial
    big_r, b = np.array(big_r), np.array(b)
    rho_p = [0.5] if p == 2 else np.linalg.solve(big_r[:-1, :-1], b[:-1])
    rho_c = [0.5] if p == 1 else np.linalg.solve(big_r, b)
    base = kept * x - unit * math.expm1(hh) * m[0]
    predicted = base - unit * big * float(np.dot(rho_p, d)) if p > 1 else base
    return predicted, base - unit * big * float(np.dot(rho_c[:-1], d) + rho_c[-1] * (m_end - m[0]))


@PATHS
@SEEDS
@PREDICTIONS
@pytest.mark.parametrize("bh", ["bh1", "bh2"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc(p, bh, prediction, seed, path):
    end, known, y, m = problem(path, p, seed)
    second = "bh1" if bh == "bh1" else "midpoint"
    solver = ExponentialAdams(order=p, second=second, prediction=prediction, corrector=True)
    step = apply(solver.predict(end, known, p), y, m, x0_of(known[0], y, prediction, m[0]))
    redone = apply(solver.correct(end, known, known[0], p), step, [0.31, *m], anchor=y)
    naive = unipc(end, known, known[0].alpha * y, m, 0.31, prediction, bh)
    assert (end.alpha * step, end.alpha * redone) == pytest.approx(naive, rel=1e-9)


def vary(hp: list[float], r: np.ndarray, d: np.ndarray) -> float:
    """sum_k hp_(k+1) sum_j A[k, j] D_j with A the inverse of C, C[:, k] = r^(k-1) / k!."""
    powers = range(1, len(r) + 1)
    a = np.linalg.inv(np.array([[q ** (k - 1) / math.factorial(k) for k in powers] for q in r]).reshape(len(r), len(r)))
    return sum(hp[k] * float(a[k - 1] @ d) for k in powers)


@PATHS
@SEEDS
@PREDICTIONS
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc_vary_with_every_row_of_its_corrector(p, prediction, seed, path):
    """`vary_coeff` of the authors' code, its corrector summed over all rows; as shipped it is of first order."""
    end, known, y, m = problem(path, p, seed)
    h, x, m_end = end.lam - known[0].lam, known[0].alpha * y, -0.8
    kept, unit, _, _ = printed(end, known[0], prediction)
    hh = -h if prediction == "x0" else h
    r = np.array([(n.lam - known[0].lam) / h for n in known[1:]] + [1.0])
    d = np.array([(v - m[0]) / q for v, q in zip([*m[1:], m_end], r, strict=True)])
    hp = [math.expm1(hh)]
    for k in range(1, p + 1):
        hp.append(hp[-1] / hh - 1 / math.factorial(k))

    base = kept * x - unit * hp[0] * m[0]
    naive = base - unit * vary(hp, r[:-1], d[:-1]), base - unit * vary(hp, r, d)
    solver = ExponentialAdams(order=p, second="exact", prediction=prediction, corrector=True)
    step = apply(solver.predict(end, known, p), y, m, x0_of(known[0], y, prediction, m[0]))
    redone = apply(solver.correct(end, known, known[0], p), step, [m_end, *m], anchor=y)
    assert (end.alpha * step, end.alpha * redone) == pytest.approx(naive, rel=1e-9)
