"""Tables: what every search starts from and returns, and how any solver of ours becomes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffaccel.samplers.grid import TimeGrid
from diffaccel.samplers.non_stationary import Rows
from diffaccel.samplers.plan import Start, Step, make_plan
from diffaccel.samplers.row import x0_coefficients
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.solver import Multistep, Singlestep
from diffaccel.samplers.stages import with_stages

Refine = Callable[[int, FloatArray], Sequence[float] | FloatArray | None]


@dataclass(frozen=True)
class Table:
    """A sampler of one grid: where the network is called, what it is told, and the weights of `NonStationary`.

    Attributes:
        grid: of the run.
        rows: see `NonStationary`.
    """

    grid: TimeGrid
    rows: Rows

    @property
    def steps(self) -> int:
        """Network calls."""
        return len(self.rows)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Half log-SNR of the calls, and of the end (inf: sigma = 0)."""
        return self.grid.lambdas

    @property
    def timesteps(self) -> FloatArray:
        """What the network is told at each call."""
        return self.grid.timesteps


@dataclass(frozen=True)
class Found:
    """What a search returns.

    Attributes:
        table: the sampler.
        notes: what was learned and how, with a JSON form: for people, and for plots.
    """

    table: Table
    notes: dict[str, Any] = field(default_factory=dict)


def grid_of(
    schedule: NoiseSchedule,
    lambdas: Sequence[float] | FloatArray,
    end: float = math.inf,
    timesteps: Sequence[float] | FloatArray | None = None,
) -> TimeGrid:
    """Grid of calls at half log-SNR `lambdas`, increasing, that ends at `end`; the network is told exact times."""
    told = schedule.time_at(np.asarray(lambdas)) if timesteps is None else np.asarray(timesteps, dtype=np.float64)
    return TimeGrid((*map(float, lambdas), float(end)), told)


def tabulate(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    solver: Multistep | Singlestep,
    *,
    start: Start = "euler",
    refine: Refine | None = None,
) -> Table:
    """Any deterministic solver on any grid as a table: its plan, run on symbols instead of tensors.

    A symbol is a vector of weights over the first sample and the x0 predictions of all calls.

    Args:
        schedule: path of the network.
        grid: of the run. A multistep solver takes it as it is; a singlestep one wants one with stages.
        solver: without noise.
        start: see `make_plan`.
        refine: (index of the call, times of the predictions that are kept, newest first) -> weights, by which the
            newest of them is replaced for good, or None. What is kept is the solver's `memory`.

    Raises:
        ValueError: for a stochastic solver.
    """
    if hasattr(solver, "stages") and not grid.stages:
        grid = with_stages(schedule, solver, grid)  # pyright: ignore[reportArgumentType]
    states, _ = unrolled(schedule, grid, solver, start=start, refine=refine)
    return Table(grid, rows_of(schedule, grid.lambdas, states))


def unrolled(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    solver: Multistep | Singlestep,
    *,
    start: Start = "euler",
    refine: Refine | None = None,
) -> tuple[list[FloatArray], list[FloatArray]]:
    """Samples x of a run in symbols: (n + 1,) weights over the first sample and the x0 predictions of the n calls.

    Arguments as of `tabulate`.

    Returns:
        The n + 1 samples that the network is called at, the last of them the end; and the n samples that steps start
        from, once their own call has corrected them.
    """
    if solver.stochastic:
        raise ValueError("a solver with noise is no table of weights; use a deterministic one, or eta=0")
    # Rows are written with x0; the network's own prediction type does not enter them.
    plan = make_plan(
        schedule, grid, solver, lambda lam: x0_coefficients("sample", *schedule.alpha_sigma(lam)), start=start
    )
    n, times = len(plan), grid.timesteps
    states = [np.eye(1, n + 1)[0]]
    corrected: list[FloatArray] = []
    kept: list[FloatArray] = []  # newest first
    told: list[float] = []
    anchor = states[0]
    for i, step in enumerate(plan):
        x, x0 = states[-1], np.eye(1, n + 1, 1 + i)[0]
        p, q = step.keep
        kept = [p * x + q * x0, *(kept[1:] if step.again else kept)]
        told = [float(times[i]), *(told[1:] if step.again else told)]
        corrected.append(_corrected(step, x, x0, anchor, kept))
        weights = refine(i, np.array(told)) if refine else None
        if weights is not None:
            kept[0] = _sum(weights, kept, n)
            x0 = (kept[0] - p * x) / q
        if not step.hold:
            anchor = corrected[-1]
        row = step.predict
        states.append(row.x * corrected[-1] + row.x0 * x0 + _sum(row.m, kept, n))
    return states, corrected


def _corrected(step: Step, x: FloatArray, x0: FloatArray, anchor: FloatArray, kept: Sequence[FloatArray]) -> FloatArray:
    row = step.correct
    if row is None:
        return x
    return row.x * x + row.anchor * anchor + row.x0 * x0 + _sum(row.m, kept, len(x) - 1)


def _sum(weights: Sequence[float] | FloatArray, vectors: Sequence[FloatArray], n: int) -> FloatArray:
    return sum((w * v for w, v in zip(weights, vectors, strict=False)), np.zeros(n + 1))


def rows_of(schedule: NoiseSchedule, lambdas: Sequence[float], states: Sequence[FloatArray]) -> Rows:
    """From states in x to steps between them in y = x / alpha."""
    ys = [x / schedule.alpha_sigma(lam)[0] for x, lam in zip(states, lambdas, strict=True)]
    rows = []
    for i in range(len(ys) - 1):
        kept = ys[i + 1][0] / ys[i][0] if ys[i][0] else 0.0
        rest = (ys[i + 1] - kept * ys[i])[1 : i + 2]
        rows.append((float(kept), *map(float, rest[::-1])))
    return tuple(rows)
