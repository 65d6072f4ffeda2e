"""TimeGrid: which noise levels are visited. Every spacing is a short function; each works with every solver.

Two kinds: an index spacing picks positions in the training table (0..T-1, fractions allowed), a sigma spacing picks
noise levels. A new one is a function plus a line in `INDEX_SPACINGS` or `SIGMA_SPACINGS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffaccel.samplers.schedule import FloatArray, NoiseSchedule

Final = Literal["zero", "sigma_min"]
Clock = Literal["float", "integer"]


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Noise levels of a run, and what the network is told at each.

    Attributes:
        lambdas: n + 1 half log-SNR nodes, increasing; the last is inf when the run ends at sigma = 0. A node may
            stand twice in a row: the network is then called again at the corrected sample.
        timesteps: (n,) float64, what the network is told at each node but the last.
    """

    lambdas: tuple[float, ...]
    timesteps: FloatArray

    def __post_init__(self) -> None:
        steps = np.diff(self.lambdas)
        if len(self.lambdas) != len(self.timesteps) + 1 or np.isnan(steps).any() or (steps < 0).any():
            raise ValueError("the noise levels of a time grid must fall from step to step")

    def with_second_call(self) -> TimeGrid:
        """Let the second node be evaluated twice, for starts that need a better prediction there."""
        lam, t = self.lambdas, self.timesteps
        return TimeGrid((lam[0], lam[1], *lam[1:]), np.array([t[0], t[1], *t[1:]]))


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


def karras(high: float, low: float, n: int) -> FloatArray:
    """EDM's rho = 7 spacing (arXiv:2206.00364, eq. 5)."""
    return np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7


def exponential(high: float, low: float, n: int) -> FloatArray:
    """Evenly spaced log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


INDEX_SPACINGS: dict[str, Callable[[int, int, int], FloatArray]] = {
    "linspace": linspace,
    "leading": leading,
    "ddim_uniform": ddim_uniform,
    "normal": normal,
    "trailing": trailing,
    "flow_linspace": flow_linspace,
    "beta": beta,
}
SIGMA_SPACINGS: dict[str, Callable[[float, float, int], FloatArray]] = {"karras": karras, "exponential": exponential}
SPACINGS = (*INDEX_SPACINGS, *SIGMA_SPACINGS, "logsnr", "flow")


def time_grid(
    schedule: NoiseSchedule,
    n: int,
    spacing: str,
    *,
    final: Final = "zero",
    clock: Clock = "float",
    offset: int = 0,
    shift: float = 1.0,
    stretch_to: float | None = None,
    sigma_range: tuple[float | None, float | None] = (None, None),
) -> TimeGrid:
    """Grid of `n` network calls, 1 <= n <= T, that ends at sigma = 0 or at the smallest trained sigma.

    Args:
        schedule: noise schedule of the network.
        n: number of network calls.
        spacing: one of `SPACINGS`.
        final: `zero` ends on the clean sample, `sigma_min` where the trained noise ends. No node is visited twice.
        clock: `float` tells the network the exact time; `integer` rounds it, as Diffusers does.
        offset: added to the positions of `leading` and `ddim_uniform`, as far as the table reaches.
        shift: flow paths only: the static shift of SD3 (arXiv:2403.03206, eq. 23). It multiplies sigma / alpha, which
            in log-SNR is a translation by -log(shift).
        stretch_to: flow paths only: stretch 1 - sigma so that the last call is made at this sigma (LTX).
        sigma_range: (smallest, largest) sigma of `karras` and `exponential`; None is the trained one.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown schedule {spacing!r}; use {', '.join(SPACINGS)}")
    if spacing in ("flow", "flow_linspace") and schedule.path != "flow":
        raise ValueError("schedule 'flow' is for flow-matching models; use linspace, trailing, karras or logsnr here")
    if not 1 <= n <= schedule.count:
        raise ValueError(f"steps must be between 1 and the {schedule.count} training timesteps, not {n}")
    nodes = n + 1 if final == "sigma_min" else n
    lam = _nodes(schedule, nodes, n, spacing, clock, offset, shift, sigma_range)
    if schedule.path == "flow" and stretch_to is not None:
        lam = _stretched(schedule, lam, n, stretch_to)
    end = math.inf
    if final == "sigma_min":
        end = float(lam[n]) if len(lam) > n else schedule.lambda_min_noise - _shift_of(schedule, shift)
    lam = lam[:n]
    if end <= lam[-1] + 1e-9:
        end = math.inf  # the last call is made at sigma_min already: spend it on the step to zero
    if len(lam) > 1 and np.diff(lam).min() <= 0:
        raise ValueError(f"{n} steps of {spacing!r} repeat a noise level on the integer clock; use timesteps='float'")
    times = schedule.time_at(lam)
    if clock == "integer" and schedule.path != "flow":
        times = times.round()
    return TimeGrid((*map(float, lam), end), times)


def grid_from_sigmas(
    schedule: NoiseSchedule,
    sigmas: Sequence[float] | FloatArray,
    *,
    shift: float = 1.0,
    stretch_to: float | None = None,
    timesteps: Sequence[float] | FloatArray | None = None,
) -> TimeGrid:
    """Grid of given `sigmas` (see `NoiseSchedule.sigma_at`), strictly decreasing; a last 0 may be left out.

    On flow paths they are shifted and stretched as `time_grid` says, since that is what pipelines of flow models
    expect of the sigmas they pass. `timesteps`, one for each, change what the network is told and nothing else.
    """
    values = _numbers(sigmas)
    if values.size and values[-1] == 0:
        values = values[:-1]
    if not values.size or not (np.diff(values) < 0).all() or not values[-1] > 0:
        raise ValueError(
            "sigmas must be a list of positive numbers that fall from step to step, such as [14.6, 2.1, 0]"
        )
    if schedule.path == "flow" and values[0] > 1:
        raise ValueError(f"sigmas of a flow model lie between 0 and 1, not at {values[0]:g}")
    lam = schedule.lambda_of_sigma(values)
    if schedule.path == "flow":
        lam = lam - math.log(shift)
        lam = lam if stretch_to is None else _stretched(schedule, lam, len(lam), stretch_to)
    times = schedule.time_at(lam) if timesteps is None else _numbers(timesteps)
    if len(times) != len(lam):
        raise ValueError(f"{len(times)} timesteps were given for {len(lam)} sigmas")
    if not (np.diff(times) <= 0).all():
        raise ValueError("timesteps must be a list of numbers that fall from step to step, such as [999, 666, 333]")
    return TimeGrid((*map(float, lam), math.inf), times)


def grid_from_timesteps(schedule: NoiseSchedule, timesteps: Sequence[float] | FloatArray, final: Final) -> TimeGrid:
    """Grid of given network times, strictly decreasing and inside the trained range."""
    times = _numbers(timesteps)
    low, high = schedule.times[0], schedule.times[-1]
    if not times.size or not (np.diff(times) < 0).all():
        raise ValueError("timesteps must be a list of numbers that fall from step to step, such as [999, 666, 333]")
    if not (low <= times[-1] and times[0] <= high):
        raise ValueError(f"timesteps must lie between {low:g} and {high:g}, the trained range")
    lam = schedule.lambda_at(times)
    end = schedule.lambda_min_noise if final == "sigma_min" and schedule.lambda_min_noise > lam[-1] else math.inf
    return TimeGrid((*map(float, lam), end), times)


def _numbers(values: Sequence[float] | FloatArray) -> FloatArray:
    """Float64 list of finite numbers; empty for anything else, which the callers refuse in their own words."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty(0)
    return array if array.ndim == 1 and np.isfinite(array).all() else np.empty(0)


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


def _nodes(
    schedule: NoiseSchedule,
    nodes: int,
    n: int,
    spacing: str,
    clock: Clock,
    offset: int,
    shift: float,
    sigma_range: tuple[float | None, float | None],
) -> FloatArray:
    """Half log-SNR of the calls; sigma spacings with `nodes` = n + 1 also give the end of the run."""
    if spacing in INDEX_SPACINGS:
        last = len(schedule.lambdas) - 1
        index = INDEX_SPACINGS[spacing](last, n, offset)
        if clock == "integer":
            index = _integer_index(spacing, index, last, n, offset)
        times = np.interp(index, np.arange(last + 1), schedule.times)
        return schedule.lambda_at(times) - _shift_of(schedule, shift)
    if spacing == "flow":
        return _flow_nodes(schedule, nodes, shift)
    ends = float(schedule.lambdas[-1]), float(schedule.lambdas[0])
    if schedule.path == "flow":  # the table's own first sigma is 0: end where the flow spacing ends
        ends = float(_flow_nodes(schedule, 2, shift)[0]), float(_flow_nodes(schedule, 2, shift)[1])
    if spacing == "logsnr":
        # Pure noise on a flow path has no log-SNR: start one training timestep below it.
        start = float(schedule.lambda_at(schedule.times[-2])) - _shift_of(schedule, shift)
        return np.linspace(start if schedule.path == "flow" else ends[0], ends[1], nodes)
    high, low = (float(s) for s in schedule.sigma_at(ends))
    low, high = sigma_range[0] or low, sigma_range[1] or high
    return schedule.lambda_of_sigma(SIGMA_SPACINGS[spacing](high, low, nodes))


def _flow_nodes(schedule: NoiseSchedule, nodes: int, shift: float) -> FloatArray:
    """Uniform sigma from 1 to the end of the shifted table, then shifted (again), as FlowMatchEulerDiscrete does."""
    steps = schedule.times[-1]
    sigmas = np.linspace(1.0, shift / (steps + shift - 1), nodes)
    return schedule.lambda_of_sigma(sigmas) - math.log(shift)


def _integer_index(spacing: str, index: FloatArray, last: int, n: int, offset: int) -> FloatArray:
    """Diffusers' integer positions: `leading` floors its step, the others round."""
    if spacing == "leading":
        return (np.arange(n, 0, -1) * ((last + 1) // (n + 1)) + offset).astype(np.float64)
    if spacing == "ddim_uniform":
        return (np.arange(n - 1, -1, -1) * ((last + 1) // n) + offset).astype(np.float64)
    return (index + 1).round() - 1 if spacing == "trailing" else index.round()


def _inside(index: FloatArray, last: int) -> FloatArray:
    return index - max(0.0, float(index[0]) - last)


def _shift_of(schedule: NoiseSchedule, shift: float) -> float:
    return math.log(shift) if schedule.path == "flow" else 0.0


def _stretched(schedule: NoiseSchedule, lam: FloatArray, n: int, stretch_to: float) -> FloatArray:
    sigma = schedule.sigma_at(lam)
    if n == 1 or sigma[n - 1] == sigma[0]:
        return lam  # one call: there is nothing to stretch
    return schedule.lambda_of_sigma(1 - (1 - sigma) * (1 - stretch_to) / (1 - sigma[n - 1]))
