"""What a pipeline asks of `set_timesteps`, turned into a TimeGrid: the last place that reads configs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffaccel.samplers.config import spacing as spacing_of
from diffaccel.samplers.grid import SIGMA_SPACINGS, Final, TimeGrid, grid_from_sigmas, grid_from_timesteps, time_grid
from diffaccel.samplers.plan import second_call_needed
from diffaccel.samplers.schedule import NoiseSchedule
from diffaccel.samplers.solver import Solver


def requested_grid(
    config: Mapping[str, Any],
    schedule: NoiseSchedule,
    solver: Solver,
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
        sigmas: noise levels.
        mu: dynamic shift of flow models.
        leading: spacing that `timestep_spacing="leading"` stands for.
        final: end of the run.
    """
    shift = shift_of(config, mu)
    if sigmas is None and timesteps is None:
        return _spaced_grid(config, schedule, solver, n, shift, leading, final)
    if sigmas is not None:
        stretch_to = config["shift_terminal"]
        grid = grid_from_sigmas(schedule, sigmas, shift=shift, stretch_to=stretch_to, timesteps=timesteps)
        spacing = spacing_of(config)
        if schedule.path == "flow" and timesteps is None and not spacing.startswith("flow"):
            # Flux-like pipelines pass evenly spaced sigmas whatever the scheduler: a spacing asked for by name takes
            # their number and ends, as in FlowMatchEulerDiscreteScheduler.
            low, high = (float(s) for s in schedule.sigma_at([grid.lambdas[-2], grid.lambdas[0]]))
            count = len(grid.timesteps)
            # Karras and exponential levels end where the pipeline's do; what comes after them is sigma = 0.
            end = "zero" if spacing in SIGMA_SPACINGS else final
            grid = time_grid(schedule, count, spacing, final=end, shift=shift, sigma_range=(low, high))
    else:
        assert timesteps is not None
        grid = grid_from_timesteps(schedule, timesteps, final)
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


def _spaced_grid(
    config: Mapping[str, Any],
    schedule: NoiseSchedule,
    solver: Solver,
    n: int | None,
    shift: float,
    leading: str,
    final: Final,
) -> TimeGrid:
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise ValueError(f"pass num_inference_steps (a whole number), timesteps or sigmas; got {n!r}")
    options = config["solver_options"] or {}
    twice = second_call_needed(solver, options.get("start", "euler"), int(n))
    spacing = spacing_of(config)
    grid = time_grid(
        schedule,
        int(n) - twice,
        leading if spacing == "leading" else spacing,
        final=final,
        clock=options.get("timesteps", "float"),
        offset=config["steps_offset"],
        shift=shift,
        stretch_to=config["shift_terminal"],
        sigma_range=(config["sigma_min"], config["sigma_max"]),
    )
    return grid.with_second_call() if twice else grid
