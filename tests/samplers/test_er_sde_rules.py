"""ER-SDE and accelerated DDPM against their printed lines, the integrals in 30 digits."""

import math

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from diffaccel.samplers.accelerated_ddpm import AcceleratedDDPM
from diffaccel.samplers.er_sde import ERSDE, NOISE_SCALES
from tests.samplers.levels import SCHEDULES, apply, of_ve_sigma, random_nodes

mpmath.mp.dps = 30
PHI = {
    "ode": lambda x: x,
    "sde": lambda x: x**2,
    "sde_1": lambda x: x * (mpmath.exp(-1 / x) + 10),
    "sde_2": lambda x: x ** mpf(1.5),
    "sde_3": lambda x: x ** mpf(2.5),
    "sde_4": lambda x: x ** mpf("0.9") * mpmath.log10(1 + 100 * x ** mpf(1.5)),
    "sde_5": lambda x: x * (mpmath.exp(x ** mpf("0.3")) + 10),
}
CLOSED = {  # int_a^b 1 / phi and int_a^b l / phi
    "ode": (lambda a, b: mpmath.log(b / a), lambda a, b: b - a),
    "sde": (lambda a, b: 1 / a - 1 / b, lambda a, b: mpmath.log(b / a)),
    "sde_2": (lambda a, b: 2 * (a**-0.5 - b**-0.5), lambda a, b: 2 * (b**0.5 - a**0.5)),
    "sde_3": (lambda a, b: 2 * (a**-1.5 - b**-1.5) / 3, lambda a, b: 2 * (a**-0.5 - b**-0.5)),
}
GRIDS = {  # sigma / alpha, oldest first, the last is where the step goes
    "middle": [7.0, 3.1, 2.2, 1.0],
    "small": [0.03, 0.019, 0.006, 0.002],
    "large": [80.0, 61.0, 33.0, 30.5],
    "long": [80.0, 40.0, 11.0, 0.02],
    "short": [1.003, 1.002, 1.001, 1.0],
}


def integrals(scale: str, a: mpf, b: mpf) -> tuple[mpf, mpf]:
    """(s, int l / phi) from a to b, closed where a closed form is known."""
    if scale in CLOSED:
        return CLOSED[scale][0](a, b), CLOSED[scale][1](a, b)
    edges = mpmath.linspace(mpmath.log(a), mpmath.log(b), 7)
    s = mpmath.quad(lambda u: mpmath.exp(u) / PHI[scale](mpmath.exp(u)), edges)
    return s, mpmath.quad(lambda u: mpmath.exp(2 * u) / PHI[scale](mpmath.exp(u)), edges)


def printed(scale: str, sigmas: list[float], y: float, x0: list[float], z: float) -> float:
    """The lines of the paper for as many predictions as `x0` has, newest first, in y = x / alpha.

    D1 is the derivative at the newest level of the parabola; the authors take the last difference for it.
    """
    a, *known = (mpf(v) for v in sigmas[::-1])
    b, phi = known[0], PHI[scale]
    r, step = phi(a) / phi(b), a - b
    out = r * y + (1 - r) * x0[0] + mpmath.sqrt(max(mpf(0), a**2 - b**2 * r**2)) * z
    if len(x0) > 1:
        s, s_l = integrals(scale, a, b)
        d1 = (mpf(x0[0]) - x0[1]) / (b - known[1])
        d2 = mpf(0)
        if len(x0) > 2:
            d2 = 2 * (d1 - (mpf(x0[1]) - x0[2]) / (known[1] - known[2])) / (b - known[2])
            d1 += d2 / 2 * (b - known[1])
        out += (step + s * phi(a)) * d1 + (step**2 / 2 + (s_l - b * s) * phi(a)) * d2
    return float(out)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale", PHI)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_is_its_printed_lines(order, scale, grid):
    sigmas = GRIDS[grid][-order - 1 :]
    y, z, *x0 = np.random.default_rng(0).normal(size=2 + order).tolist()
    *known, end = of_ve_sigma("vp", sigmas)
    row = ERSDE(order, scale).predict(end, known[::-1], order)
    # Differences of neighbours that are 0.1 % apart keep fewer digits.
    tolerance = 1e-7 if grid == "short" else 1e-9
    assert apply(row, y, x0, noise=z) == pytest.approx(printed(scale, sigmas, y, x0, z), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale", PHI)
def test_er_sde_noise_is_that_of_its_sde(scale, grid):
    """int (phi(a) / phi(x))^2 h(x)^2 dx with h^2 = 2 x^2 (phi' / phi - 1 / x), the noise that phi stands for."""
    a, b = (mpf(v) for v in GRIDS[grid][:1:-1])
    phi = PHI[scale]

    def density(u: mpf) -> mpf:
        x = mpmath.exp(u)
        return x * (phi(a) / phi(x)) ** 2 * 2 * x**2 * (mpmath.diff(phi, x) / phi(x) - 1 / x)

    variance = mpmath.quad(density, mpmath.linspace(mpmath.log(a), mpmath.log(b), 5), maxdegree=5)
    start, end = of_ve_sigma("ve", [b, a])
    assert ERSDE(1, scale).predict(end, [start], 1).noise ** 2 == pytest.approx(float(variance), rel=1e-8, abs=1e-18)


def test_er_sde_as_the_ode_is_ddim_and_ends_on_x0():
    start, end, zero = of_ve_sigma("vp", [2.0, 0.5, 0.0])
    row = ERSDE(1, "ode").predict(end, [start], 1)
    assert (row.x, *row.m, row.noise) == pytest.approx((0.25, 0.75, 0.0))
    assert ERSDE(3).predict(zero, [start], 1).m == (1.0,)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_is_the_same_on_every_path(order):
    rows = []
    for path in SCHEDULES:
        *known, end = of_ve_sigma(path, GRIDS["middle"][-order - 1 :])
        row = ERSDE(order).predict(end, known[::-1], order)
        rows.append((row.x, *row.m, row.noise))
    assert rows[1] == pytest.approx(rows[0], rel=1e-12)
    assert rows[2] == pytest.approx(rows[0], rel=1e-12)


@pytest.mark.parametrize("scale", PHI)
def test_er_sde_corrector_is_the_same_step_with_one_more_point(scale):
    """Redone by naive Lagrange integrals of K(x) = d/dx (1 - phi(a) / phi(x)), the noise kept as drawn."""
    sigmas, order = [3.1, 2.2, 1.0], 2
    *known, end = of_ve_sigma("vp", sigmas)
    known, solver = known[::-1], ERSDE(order, scale)
    y, z, m_end, *m = np.random.default_rng(1).normal(size=3 + order).tolist()
    step = apply(solver.predict(end, known, order), y, m, noise=z)
    redone = apply(solver.correct(end, known, known[0], order), step, [m_end, *m], anchor=y)
    a, b = mpf(end.ve_sigma), mpf(known[0].ve_sigma)
    phi, points = PHI[scale], [mpf(n.ve_sigma) for n in (end, *known)]

    def kernel(x: mpf, j: int) -> mpf:
        basis = mpmath.fprod((x - p) / (points[j] - p) for i, p in enumerate(points) if i != j)
        return phi(a) * mpmath.diff(phi, x) / phi(x) ** 2 * basis

    past = sum(mpmath.quad(lambda x, j=j: kernel(x, j), [a, b]) * v for j, v in enumerate([m_end, *m]))
    r = phi(a) / phi(b)
    expected = r * y + past + mpmath.sqrt(max(mpf(0), a**2 - b**2 * r**2)) * z
    assert redone == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
def test_accelerated_ddpm_is_its_two_printed_lines(seed):
    """y = x + sqrt((1 - a) / 2) z; x' = (y + (1 - a) s(y)) / sqrt(a) + sqrt((1 - a) / 2) z+, both noises as one."""
    levels = [*random_nodes("vp", 4, seed), *of_ve_sigma("vp", [0])]
    rng, solver = np.random.default_rng(seed), AcceleratedDDPM()
    for i in range(len(levels) - 2):
        now, after = levels[i], levels[i + 1]
        ab, ab_next = now.alpha**2, after.alpha**2
        noisy, eps = rng.normal(size=2)  # what the network saw, and what it said
        ratio = ab / ab_next
        score = -eps / math.sqrt(1 - ab)
        mean = (noisy + (1 - ratio) * score) / math.sqrt(ratio)
        # z+ of this step and z of the next one, whose own ratio is that to the level after it
        ratio_next = ab_next / levels[i + 2].alpha ** 2
        variance = (1 - ratio) / 2 + (1 - ratio_next) / 2
        (row,) = solver.rows(levels, i, 1)
        x0 = (noisy - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
        assert after.alpha * apply(row, noisy / now.alpha, [x0]) == pytest.approx(mean, rel=1e-11)
        assert (after.alpha * row.noise) ** 2 == pytest.approx(variance, rel=1e-11)
    (row,) = solver.rows(levels, len(levels) - 2, 1)
    assert (row.x, row.m, row.noise) == (0.0, (1.0,), 0.0)


def test_accelerated_ddpm_is_the_same_on_every_path():
    rows = [AcceleratedDDPM().rows(of_ve_sigma(path, [5.0, 2.0, 0.7, 0.0]), 0, 1)[0] for path in SCHEDULES]
    for row in rows[1:]:
        assert (row.x, *row.m, row.noise) == pytest.approx((rows[0].x, *rows[0].m, rows[0].noise), rel=1e-12)


@pytest.mark.parametrize("high", [14.6, 80.0, 700.0, 1e4, 1e9])
@pytest.mark.parametrize("scale", NOISE_SCALES)
def test_noise_keeps_its_level_from_any_start(scale, high):
    """phi / x must not fall: that of sde_4 does beyond 1022, where a flow or zero-SNR run starts, and is held there."""
    start, end = of_ve_sigma("flow", [high, high / 3])
    row = ERSDE(1, scale).predict(end, [start], 1)
    assert math.hypot(row.x * start.ve_sigma, row.noise) == pytest.approx(end.ve_sigma, rel=1e-6)
