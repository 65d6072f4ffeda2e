"""What a pipeline asks of `set_timesteps`, turned into a TimeGrid: the last place that reads configs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from diffaccel.samplers.config import spacing as spacing_of
from diffaccel.samplers.grid import Final, TimeGrid, grid_from_sigmas, grid_from_timesteps, preceded, time_grid
from diffaccel.samplers.plan import is_singlestep, second_call_needed
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.solver import Multistep, Singlestep
from diffaccel.samplers.spacing import SIGMA_SPACINGS
from diffaccel.samplers.stages import staged_grid, with_stages


def requested_grid(
    config: Mapping[str, Any],
    schedule: NoiseSchedule,
    solver: Multistep | Singlestep,
    n: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
    *,
    leading: str,
    final: Final,
) -> TimeGrid:
    """Grid of `n` network calls, or of given `timesteps` or `sigmas`; see `SolverScheduler.set_timesteps`.

    Args:
        config: a scheduler config of ours.
        schedule: its noise schedule.
        solver: its solver.
        n: number of network calls.
        timesteps: network times.
        sigmas: noise levels. Singlestep solvers make their steps between them on VP and VE paths, with more calls; on
            flow paths, whose pipelines pass one a call, as many calls as there are levels.
        mu: dynamic shift of flow models.
        leading: spacing that `timestep_spacing="leading"` stands for.
        final: end of the run.
    """
    shift = shift_of(config, mu)
    if sigmas is None and timesteps is None:
        return _spaced_grid(config, schedule, solver, n, shift, leading, final)
    strength = (config["solver_options"] or {}).get("strength", 1.0)
    if strength != 1 and (schedule.path != "flow" or timesteps is not None):
        raise ValueError("strength spreads a schedule over what is left of the noise; pass no timesteps or sigmas")
    if sigmas is not None:
        stretch_to = config["shift_terminal"]
        grid = grid_from_sigmas(schedule, sigmas, shift=shift, stretch_to=stretch_to, timesteps=timesteps)
        calls = strength_calls("flow", len(grid.timesteps), strength)
        if schedule.path == "flow" and timesteps is None and not spacing_of(config).startswith("flow"):
            grid = _respaced(config, schedule, grid, shift, strength, final)
        elif strength != 1:
            left = grid_from_sigmas(schedule, _below(sigmas, strength, calls), shift=shift, stretch_to=stretch_to)
            grid = preceded(schedule, left, len(grid.timesteps) - calls)
    else:
        assert timesteps is not None
        grid = grid_from_timesteps(schedule, timesteps, final)
        calls = len(grid.timesteps)
    if is_singlestep(solver) and schedule.path == "flow":
        grid = _staged_within(schedule, solver, grid, len(grid.timesteps) - calls)
    elif is_singlestep(solver):
        grid = with_stages(schedule, solver, grid)
    if n is not None and n != len(grid.timesteps):
        raise ValueError(f"num_inference_steps is {n}, but {len(grid.timesteps)} sigmas or timesteps were given")
    return grid


def shift_of(config: Mapping[str, Any], mu: float | None) -> float:
    """Static shift of a flow path; with dynamic shifting, the one that `mu` stands for."""
    if config["use_dynamic_shifting"]:
        if mu is None:
            raise ValueError("this model shifts its noise levels with the picture size; pass mu to set_timesteps()")
        shift = math.exp(mu) if config["time_shift_type"] == "exponential" else float(mu)
    else:
        shift = float(config["flow_shift"] if config["use_flow_sigmas"] else config["shift"])
    if not shift > 0:
        raise ValueError(f"the shift of a flow model must be above 0 (1 is none), not {shift:g}")
    return shift


def strength_calls(path: str, n: int, strength: float) -> int:
    """How many of `n` calls an image-to-image pipeline makes at `strength`, 0 < strength <= 1; the last ones.

    int(n * strength), as in Diffusers' StableDiffusionImg2ImgPipeline; on flow paths n - int(n - n * strength), as in
    those of SD3 and Flux, which rounds up.
    """
    check_strength(strength)
    calls = n - int(n - n * strength) if path == "flow" else int(n * strength)
    if calls < 1:
        raise ValueError(f"strength {strength:g} leaves none of {n} network calls; use more steps or a larger strength")
    return calls


def _from_the_top(spacing: str, strength: float) -> str:
    """Spacing that begins at the strength's level; `leading` and `ddim_uniform` begin up to a step below."""
    return "trailing" if strength != 1 and spacing in ("leading", "ddim_uniform") else spacing


def check_strength(strength: Any) -> None:
    """Refuse what is no strength of an image-to-image pipeline."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise ValueError(f"strength must lie between 0 (excluded) and 1, not {strength!r}")


def _respaced(
    config: Mapping[str, Any], schedule: NoiseSchedule, grid: TimeGrid, shift: float, strength: float, final: Final
) -> TimeGrid:
    """Grid of the spacing asked for by name, in place of that of a Flux-like pipeline's sigmas.

    Such pipelines pass evenly spaced sigmas whatever the scheduler: a named spacing takes their number and ends, as in
    FlowMatchEulerDiscreteScheduler.
    """
    spacing = _from_the_top(spacing_of(config), strength)
    low, high = (float(s) for s in schedule.sigma_at([grid.lambdas[-2], grid.lambdas[0]]))
    # Karras-like levels end where the pipeline's do; what comes after them is sigma = 0.
    keep_end = spacing in SIGMA_SPACINGS and final != "corrector"
    n = len(grid.timesteps)
    calls = strength_calls("flow", n, strength)
    left = time_grid(
        schedule.truncated(strength),
        calls,
        spacing,
        final="zero" if keep_end else final,
        shift=shift,
        sigma_range=(low if keep_end else None, high if strength == 1 else None),
    )
    return preceded(schedule, left, n - calls)


def _staged_within(schedule: NoiseSchedule, solver: Singlestep, grid: TimeGrid, skipped: int) -> TimeGrid:
    """As many calls of a singlestep solver as `grid` has, over the same levels: pipelines pass a level a call.

    Its steps are the levels of `grid` after the first `skipped`, read off at fewer points of their index; the network
    is told their exact times.
    """
    sigmas = schedule.sigma_at(grid.lambdas[skipped:])
    n = len(sigmas) - 1

    def steps_of(steps: int) -> TimeGrid:
        levels = np.interp(np.linspace(0, n, steps + 1), np.arange(n + 1), sigmas)
        lam = schedule.lambda_of_sigma(levels[:-1])
        return TimeGrid((*map(float, lam), grid.lambdas[-1]), schedule.time_at(lam))

    staged = staged_grid(schedule, solver, n, steps_of)
    return preceded(schedule, staged, skipped) if skipped else staged


def _below(sigmas: Sequence[float], strength: float, calls: int) -> FloatArray:
    """`calls` levels of a falling list, from `strength` to its last one, evenly over the index."""
    levels = np.asarray(sigmas, dtype=np.float64)
    levels = levels[levels > 0]
    index = np.arange(len(levels))
    spread = np.linspace(np.interp(-strength, -levels, index), index[-1], calls)
    return np.concatenate([[min(strength, levels[0])], np.interp(spread, index, levels)[1:]])


def _spaced_grid(
    config: Mapping[str, Any],
    schedule: NoiseSchedule,
    solver: Multistep | Singlestep,
    n: int | None,
    shift: float,
    leading: str,
    final: Final,
) -> TimeGrid:
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise ValueError(f"pass num_inference_steps (a whole number), timesteps or sigmas; got {n!r}")
    if n > schedule.count:
        raise ValueError(f"steps must be between 1 and the {schedule.count} training timesteps, not {n}")
    low, high = config["sigma_min"], config["sigma_max"]
    if (low is not None and not low > 0) or (high is not None and not high > (low or 0)):
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, not {low!r} and {high!r}")
    options = config["solver_options"] or {}
    strength = options.get("strength", 1.0)
    calls = int(n) if strength == 1 else strength_calls(schedule.path, int(n), strength)
    # The pipeline slices the first calls off, and with them a second one: see `make_plan`.
    twice = calls == n and second_call_needed(solver, options.get("start", "euler"), calls)
    spacing = spacing_of(config)
    spacing = _from_the_top(leading if spacing == "leading" else spacing, strength)
    clock = options.get("timesteps", "float")
    steps_of = partial(
        time_grid,
        schedule.truncated(strength),
        spacing=spacing,
        final=final,
        clock=clock,
        offset=config["steps_offset"],
        shift=shift,
        stretch_to=config["shift_terminal"],
        sigma_range=(config["sigma_min"], config["sigma_max"] if strength == 1 else None),
    )
    grid = staged_grid(schedule, solver, calls, steps_of, clock) if is_singlestep(solver) else steps_of(calls - twice)
    if calls < n:
        return preceded(schedule, grid, int(n) - calls, clock)
    return grid.with_second_call() if twice else grid
