"""Spacings: how the calls of a run are spread. Each is a short function, and works with every solver.

Three kinds, which differ in what they need to know:

- an index spacing `(last, n, offset)` picks n positions in the training table, 0 to `last`, fractions allowed;
- a sigma spacing `(high, low, n)` picks n noise levels, from `high` to `low`, and the run goes on to 0 after them;
- a run spacing `(schedule, high, low, n)` gives the n calls and the end of the run, n + 1 noise levels from `high`. The
  end is replaced by 0 where the run ends at 0.

A new one is a function plus a line in `INDEX_SPACINGS`, `SIGMA_SPACINGS` or `RUN_SPACINGS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.tables import AYS, align_your_steps, gits_sd15


def linspace(last: int, n: int, offset: int) -> FloatArray:
    """N of n + 1 evenly spaced positions, the one at 0 left out (arXiv:2305.08891, table 2, as DPM-Solver++ has it)."""
    return np.linspace(0, last, n + 1)[:0:-1]


def leading(last: int, n: int, offset: int) -> FloatArray:
    """Multiples of T / (n + 1), plus `offset` (arXiv:2305.08891, table 2, as DPM-Solver++ and UniPC have it)."""
    return _inside(np.arange(n, 0, -1) * ((last + 1) / (n + 1)) + offset, last)


def ddim_uniform(last: int, n: int, offset: int) -> FloatArray:
    """Multiples of T / n from 0, plus `offset`: what DDIM and Euler call leading."""
    return _inside(np.arange(n - 1, -1, -1) * ((last + 1) / n) + offset, last)


def normal(last: int, n: int, offset: int) -> FloatArray:
    """N evenly spaced positions, both ends included: the `normal` schedule of ComfyUI, A1111's uniform."""
    return np.linspace(last, 0, n)


def trailing(last: int, n: int, offset: int) -> FloatArray:
    """From the very last training timestep in steps of T / n (arXiv:2305.08891, table 2)."""
    return (last + 1) * (1 - np.arange(n) / n) - 1


def flow_linspace(last: int, n: int, offset: int) -> FloatArray:
    """N of n + 1 evenly spaced sigmas from 1 to 1 / T, the last one left out: `use_flow_sigmas` of Diffusers' UniPC."""
    return np.linspace(last, 1, n + 1)[:-1]


def beta(last: int, n: int, offset: int) -> FloatArray:
    """Quantiles of Beta(0.6, 0.6) over the *timesteps* (arXiv:2407.12173).

    Diffusers' `use_beta_sigmas` applies the quantiles to sigma, which leaves most calls at high noise, and fails from
    32 steps on.
    """
    return last * beta_quantile(np.linspace(1, 0, n + 1)[:-1], 0.6, 0.6)


def beta57(last: int, n: int, offset: int) -> FloatArray:
    """Quantiles of Beta(0.5, 0.7) over the timesteps: RES4LYF's name for ComfyUI's `beta` with these two numbers."""
    return last * beta_quantile(np.linspace(1, 0, n + 1)[:-1], 0.5, 0.7)


def quadratic(last: int, n: int, offset: int) -> FloatArray:
    """N of n + 1 positions, even in their square root, the one at 0 left out (DEIS, arXiv:2204.13902).

    DDIM's own `quad` (arXiv:2010.02502, appendix D.3) starts at 0.8 T, and a picture from pure noise cannot.
    """
    return np.linspace(last**0.5, 0, n + 1)[:-1] ** 2


def karras(high: float, low: float, n: int) -> FloatArray:
    """EDM's rho = 7 spacing (arXiv:2206.00364, eq. 5)."""
    return np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7


def exponential(high: float, low: float, n: int) -> FloatArray:
    """Evenly spaced log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def kl_optimal(high: float, low: float, n: int) -> FloatArray:
    """Even arctan(sigma): optimal for Gaussian data of unit variance (Align Your Steps, arXiv:2404.14507).

    On flow paths sigma is the flow's own, as in ComfyUI.
    """
    return np.tan(np.linspace(math.atan(high), math.atan(low), n))


def linear_quadratic(schedule: NoiseSchedule, high: float, low: float, n: int) -> FloatArray:
    """Half of the calls on the first 2.5 % of the noise, evenly; then quadratic, without a kink (Mochi, LTX-Video).

    On flow paths the levels of Diffusers' `linear_quadratic_schedule`, and no shift is applied to them; elsewhere the
    same curve between the trained ends, where ComfyUI's goes on to 0, below what was trained.
    """
    linear = n // 2
    rest = n - linear
    slope = 0.025 / linear if linear else 0.0  # of a call on the linear part
    i = np.arange(n + 1.0)
    u = np.maximum(i - linear, 0) / rest
    done = slope * i + (1 - slope * n) * u**2
    return high - (high - low) * done


def bong_tangent(schedule: NoiseSchedule, high: float, low: float, n: int) -> FloatArray:
    """Two pieces of an arctangent that meet halfway down in sigma, after three fifths of the run, where it is steepest.

    RES4LYF's, by the formula of its MIT port in stable-diffusion.cpp; a single call is made at `high` and not, as
    there, halfway. On flow paths no shift is applied to it.
    """
    steps = n + 2
    first, slope = int(0.6 * steps), 8 / steps
    if n == 1:
        return np.array([high, low])
    above = _arctangent(np.arange(first) - float(first), slope)
    below = _arctangent(np.arange(float(steps - first)), slope)
    share = np.concatenate([0.5 + above[:-1] / 2, below / 2])  # 1 at the start, 0 at the end
    return low + (high - low) * share


def _arctangent(x: FloatArray, slope: float) -> FloatArray:
    """-arctan(slope * x), moved and scaled to fall from 1 to 0 over `x`."""
    v = np.arctan(slope * x)
    return (v[-1] - v) / (v[-1] - v[0])


def gradient_estimation(schedule: NoiseSchedule, high: float, low: float, n: int) -> FloatArray:
    """Even log sigma down to the level of timestep T // n, then the end (Permenter and Yuan, arXiv:2306.04848).

    What their code runs, where the `end` it is given has no effect. Of `n` calls the last is at sigma .57 for n = 5 and
    .23 for n = 20 (Stable Diffusion): a long last step instead of small ones near 0.
    """
    last_call = float(schedule.sigma_at(schedule.lambdas[min(schedule.count // n, schedule.count - 1)]))
    return np.append(exponential(high, last_call, n), low)


INDEX_SPACINGS: dict[str, Callable[[int, int, int], FloatArray]] = {
    "linspace": linspace,
    "leading": leading,
    "ddim_uniform": ddim_uniform,
    "normal": normal,
    "trailing": trailing,
    "flow_linspace": flow_linspace,
    "beta": beta,
    "beta57": beta57,
    "quadratic": quadratic,
}
SIGMA_SPACINGS: dict[str, Callable[[float, float, int], FloatArray]] = {
    "karras": karras,
    "exponential": exponential,
    "kl_optimal": kl_optimal,
}
RUN_SPACINGS: dict[str, Callable[[NoiseSchedule, float, float, int], FloatArray]] = {
    "linear_quadratic": linear_quadratic,
    "bong_tangent": bong_tangent,
    "gradient_estimation": gradient_estimation,
    **{name: partial(align_your_steps, name) for name in AYS},
    "gits_sd15": gits_sd15,
}
SPACINGS = (*INDEX_SPACINGS, *SIGMA_SPACINGS, *RUN_SPACINGS, "logsnr", "flow")
FLOW_ONLY = ("flow", "flow_linspace")
NEVER_FLOW = ("gradient_estimation", *AYS, "gits_sd15")  # given in sigma / alpha, which has no upper end on flow paths


def check_spacing(name: str, flow: bool) -> None:
    """Refuse an unknown spacing, and one without a meaning on the network's path (`flow` or not)."""
    if name not in SPACINGS:
        raise ValueError(f"unknown schedule {name!r}; use {', '.join(SPACINGS)}")
    if name in FLOW_ONLY and not flow:
        raise ValueError("schedule 'flow' is for flow-matching models; use linspace, trailing, karras or logsnr here")
    if name in NEVER_FLOW and flow:
        raise ValueError(
            f"schedule {name!r} is not for flow-matching models, its levels are in sigma / alpha; use flow, beta57, "
            "karras or linear_quadratic here"
        )


def beta_quantile(q: FloatArray, a: float, b: float) -> FloatArray:
    """Quantiles of the Beta(a, b) distribution at `q` in [0, 1], to about 1e-6; scipy.stats.beta.ppf without scipy.

    The density is singular at both ends. In w = x^a (and (1 - x)^b from the right) it is smooth, so that a
    trapezoidal table of 2^13 points per half suffices.
    """

    def half(a: float, b: float) -> tuple[FloatArray, FloatArray]:  # x from 0 to 1/2, and its unnormalised mass
        w = np.linspace(0, 0.5**a, 2**13)
        density = (1 - w ** (1 / a)) ** (b - 1) / a
        mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(w))])
        return w ** (1 / a), mass

    (x, left), (y, right) = half(a, b), half(b, a)
    total = left[-1] + right[-1]
    mass = np.concatenate([left, (total - right)[-2::-1]]) / total
    return np.interp(q, mass, np.concatenate([x, (1 - y)[-2::-1]]))


def integer_index(spacing: str, index: FloatArray, last: int, n: int, offset: int) -> FloatArray:
    """Diffusers' integer positions: `leading` floors its step, the others round."""
    if spacing == "leading":
        return (np.arange(n, 0, -1) * ((last + 1) // (n + 1)) + offset).astype(np.float64)
    if spacing == "ddim_uniform":
        return (np.arange(n - 1, -1, -1) * ((last + 1) // n) + offset).astype(np.float64)
    return (index + 1).round() - 1 if spacing == "trailing" else index.round()


def _inside(index: FloatArray, last: int) -> FloatArray:
    return index - max(0.0, float(index[0]) - last)
