"""Singlestep solvers on a grid: how many steps a number of network calls makes, and where the calls inside lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from diffaccel.samplers.grid import Clock, TimeGrid
from diffaccel.samplers.schedule import NoiseSchedule
from diffaccel.samplers.solver import Node, Singlestep


def staged_grid(
    schedule: NoiseSchedule, solver: Singlestep, n: int, outer: Callable[[int], TimeGrid], clock: Clock = "float"
) -> TimeGrid:
    """Grid of exactly `n` network calls, whose steps are those of `outer(K)` with the fewest steps that can take them.

    What the steps could take beyond `n` is taken off the last ones, as DPM-Solver allots its orders (arXiv:2206.00927):
    3S gets [3, 3, 2, 1] at n = 9.
    """
    for steps in range(-(-n // solver.stages), n + 1):
        grid = outer(steps)
        room = _room(schedule, solver, grid)
        if sum(room) >= n:
            break
    spare, i = sum(room) - n, len(room) - 1
    while spare:
        taken = min(spare, room[i] - 1)
        room[i], spare, i = room[i] - taken, spare - taken, i - 1
    return with_stages(schedule, solver, grid, tuple(room), clock)


def with_stages(
    schedule: NoiseSchedule,
    solver: Singlestep,
    grid: TimeGrid,
    stages: tuple[int, ...] | None = None,
    clock: Clock = "float",
) -> TimeGrid:
    """Grid whose steps are those of `grid`, with the calls inside each added: as many as it can have, or `stages`."""
    if stages is None:
        stages = tuple(_room(schedule, solver, grid))
    nodes = [Node(v, schedule) for v in grid.lambdas]
    lambdas: list[float] = []
    times: list[float] = []
    for i, s in enumerate(stages):
        inner = solver.inner(nodes, i, s)
        lambdas += [grid.lambdas[i], *(n.lam for n in inner)]
        whole = clock == "integer" and schedule.path != "flow"
        times += [float(grid.timesteps[i]), *(round(n.time) if whole else n.time for n in inner)]
    return TimeGrid((*lambdas, grid.lambdas[-1]), np.array(times), stages)


def _room(schedule: NoiseSchedule, solver: Singlestep, grid: TimeGrid) -> list[int]:
    nodes = [Node(v, schedule) for v in grid.lambdas]
    return [solver.max_stages(a, b) for a, b in itertools.pairwise(nodes)]
