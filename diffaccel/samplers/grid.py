"""TimeGrid: which noise levels are visited, from a named spacing (see `spacing.py`), or from a given list."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.spacing import INDEX_SPACINGS, RUN_SPACINGS, SIGMA_SPACINGS, check_spacing, integer_index

Final = Literal["zero", "sigma_min", "corrector"]
Clock = Literal["float", "integer"]


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """Noise levels of a run, and what the network is told at each.

    Attributes:
        lambdas: n + 1 half log-SNR nodes, increasing; the last is inf when the run ends at sigma = 0. A node may
            stand twice in a row: the network is then called again at the corrected sample. Where the last does, the
            last call is made at the end of the run, to correct the step that led there.
        timesteps: (n,) float64, what the network is told at each node but the last.
        stages: calls of each step of a singlestep solver, n in all; empty where every call is a step. Noise falls from
            step to step; calls inside a step may lie below its end.
    """

    lambdas: tuple[float, ...]
    timesteps: FloatArray
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = np.diff([self.lambdas[i] for i in self.starts()] + [self.lambdas[-1]])
        if len(self.lambdas) != len(self.timesteps) + 1 or np.isnan(steps).any() or (steps < 0).any():
            raise ValueError("the noise levels of a time grid must fall from step to step")

    def starts(self) -> list[int]:
        """Index of the first call of each step."""
        if not self.stages:
            return list(range(len(self.timesteps)))
        return [sum(self.stages[:i]) for i in range(len(self.stages))]

    def with_second_call(self) -> TimeGrid:
        """Let the second node be evaluated twice, for starts that need a better prediction there."""
        lam, t = self.lambdas, self.timesteps
        return TimeGrid((lam[0], lam[1], *lam[1:]), np.array([t[0], t[1], *t[1:]]))


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

    On a `truncated` schedule the calls are spread over what it leaves, from its own last timestep.

    Args:
        schedule: noise schedule of the network.
        n: number of network calls.
        spacing: one of `SPACINGS`.
        final: `zero` ends on the clean sample, `sigma_min` where the trained noise ends. No node is visited twice.
            `corrector` ends there too, after n - 1 calls, and makes the last call there (see `TimeGrid`); with a single
            call it means `zero`.
        clock: `float` tells the network the exact time; `integer` rounds it, as Diffusers does.
        offset: added to the positions of `leading` and `ddim_uniform`, as far as the table reaches.
        shift: flow paths only: the static shift of SD3 (arXiv:2403.03206, eq. 23). It multiplies sigma / alpha, which
            in log-SNR is a translation by -log(shift).
        stretch_to: flow paths only: stretch 1 - sigma so that the last call is made at this sigma (LTX).
        sigma_range: (smallest, largest) sigma of sigma and run spacings; None is the trained one.
    """
    check_spacing(spacing, schedule.path == "flow")
    if not 1 <= n <= schedule.count:
        raise ValueError(f"steps must be between 1 and the {schedule.count} training timesteps, not {n}")
    if final == "corrector" and n > 1:
        build = partial(time_grid, schedule, spacing=spacing, clock=clock, offset=offset, shift=shift)
        build = partial(build, stretch_to=stretch_to, sigma_range=sigma_range)
        return _ending_in_a_call(schedule, build, n, clock)
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
        hint = " on the integer clock; use timesteps='float'" if clock == "integer" else "; check sigma_min, sigma_max"
        raise ValueError(f"{n} steps of {spacing!r} repeat a noise level{hint}")
    return TimeGrid((*map(float, lam), end), _told(schedule, lam, clock))


def preceded(schedule: NoiseSchedule, grid: TimeGrid, count: int, clock: Clock = "float") -> TimeGrid:
    """The calls of `grid` after `count` others at more noise, which an image-to-image pipeline slices off.

    The added ones are even in time, from the start of the (whole) `schedule`.
    """
    times = np.linspace(schedule.times[-1], schedule.time_at(grid.lambdas[0]), count + 1)[:-1]
    lam = schedule.lambda_at(times)
    told = times if clock == "float" or schedule.path == "flow" else times.round()
    stages = (*[1] * count, *grid.stages) if grid.stages else ()
    return TimeGrid((*map(float, lam), *grid.lambdas), np.concatenate([told, grid.timesteps]), stages)


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
    """Grid of given network times, strictly decreasing and inside the trained range.

    With `final="corrector"` the last of them is the end of the run, and the call made there corrects it.
    """
    times = _numbers(timesteps)
    low, high = schedule.times[0], schedule.times[-1]
    if not times.size or not (np.diff(times) < 0).all():
        raise ValueError("timesteps must be a list of numbers that fall from step to step, such as [999, 666, 333]")
    if not (low <= times[-1] and times[0] <= high):
        raise ValueError(f"timesteps must lie between {low:g} and {high:g}, the trained range")
    lam = schedule.lambda_at(times)
    end = schedule.lambda_min_noise if final == "sigma_min" and schedule.lambda_min_noise > lam[-1] else math.inf
    if final == "corrector" and len(lam) > 1:
        end = float(lam[-1])
    return TimeGrid((*map(float, lam), end), times)


def _numbers(values: Sequence[float] | FloatArray) -> FloatArray:
    """Float64 list of finite numbers; empty for anything else, which the callers refuse in their own words."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty(0)
    return array if array.ndim == 1 and np.isfinite(array).all() else np.empty(0)


def _ending_in_a_call(schedule: NoiseSchedule, build: Callable[..., TimeGrid], n: int, clock: Clock) -> TimeGrid:
    """Grid of `build(calls, final=...)` whose last of `n` calls is made at its end."""
    grid = build(n - 1, final="sigma_min")
    end = grid.lambdas[-1]
    if math.isinf(end):  # this spacing makes its last call there by itself
        grid = build(n, final="zero")
        return TimeGrid((*grid.lambdas[:-1], grid.lambdas[-2]), grid.timesteps)
    return TimeGrid((*grid.lambdas, end), np.append(grid.timesteps, _told(schedule, np.array([end]), clock)))


def _told(schedule: NoiseSchedule, lam: FloatArray, clock: Clock) -> FloatArray:
    times = schedule.time_at(lam)
    return times.round() if clock == "integer" and schedule.path != "flow" else times


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
    """Half log-SNR of the calls; sigma and run spacings with `nodes` = n + 1 also give the end of the run."""
    if spacing in INDEX_SPACINGS:
        last = len(schedule.lambdas) - 1
        index = INDEX_SPACINGS[spacing](last, n, offset)
        if clock == "integer":
            index = integer_index(spacing, index, last, n, offset)
        if schedule.path == "flow" and n > 1 and index[-1] == 0:  # no noise at all: there is nothing to predict
            index = np.append(index[:-1], min(1.0, index[-2] / 2))
        times = np.interp(index, np.arange(last + 1), schedule.times)
        return schedule.lambda_at(times) - _shift_of(schedule, shift)
    if spacing == "flow":
        return _flow_nodes(schedule, nodes, shift)
    ends = float(schedule.lambdas[-1]), float(schedule.lambdas[0])
    if schedule.path == "flow":  # the table's own first sigma is 0: end where the flow spacing ends
        ends = float(_flow_nodes(schedule, 2, shift)[0]), float(_flow_nodes(schedule, 2, shift)[1])
    if spacing == "logsnr":
        if schedule.path == "flow":  # pure noise has no log-SNR: start one training timestep below it
            top = min(float(schedule.times[-1]), schedule.flow_end - 1)
            ends = float(schedule.lambda_at(top)) - math.log(shift), ends[1]
        return np.linspace(*ends, nodes)
    high, low = (float(s) for s in schedule.sigma_at(ends))
    low, high = sigma_range[0] or low, sigma_range[1] or high
    if spacing in SIGMA_SPACINGS:
        return schedule.lambda_of_sigma(SIGMA_SPACINGS[spacing](high, low, nodes))
    if schedule.path == "flow" and nodes == n:
        low = 0.0  # a flow network is trained down to no noise at all
    return schedule.lambda_of_sigma(RUN_SPACINGS[spacing](schedule, high, low, n)[:nodes])


def _flow_nodes(schedule: NoiseSchedule, nodes: int, shift: float) -> FloatArray:
    """Uniform sigma from 1 to the end of the shifted table, then shifted (again), as FlowMatchEulerDiscrete does."""
    steps = schedule.flow_end
    sigmas = np.linspace(schedule.times[-1] / steps, shift / (steps + shift - 1), nodes)
    return schedule.lambda_of_sigma(sigmas) - math.log(shift)


def _shift_of(schedule: NoiseSchedule, shift: float) -> float:
    return math.log(shift) if schedule.path == "flow" else 0.0


def _stretched(schedule: NoiseSchedule, lam: FloatArray, n: int, stretch_to: float) -> FloatArray:
    sigma = schedule.sigma_at(lam)
    if n == 1 or sigma[n - 1] == sigma[0]:
        return lam  # one call: there is nothing to stretch
    return schedule.lambda_of_sigma(1 - (1 - sigma) * (1 - stretch_to) / (1 - sigma[n - 1]))
