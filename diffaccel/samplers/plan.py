"""Plan: everything scalar of a run, known before the first network call.

`config -> schedule -> grid -> rows -> step`: nothing downstream writes upstream. Because the grid is fixed before the
run, every coefficient is a plain float64 number here, which is what makes a run testable, searchable and compilable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from diffaccel.samplers.grid import TimeGrid
from diffaccel.samplers.row import Row, rescale
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.solver import Solver

Start = Literal["euler", "singlestep"]


@dataclass(frozen=True)
class Step:
    """What happens after one network call; rows are in the network's own x.

    Attributes:
        x0: (p, q) with x0 = p * sample + q * model_output.
        predict: row from the (corrected) sample at this node to the next node.
        correct: row from the anchor to this node, or None when the sample is taken as it is.
        again: the call repeats the node before it, and its prediction replaces that node's.
        hold: the anchor of the next correction stays where it is.
    """

    x0: tuple[float, float]
    predict: Row
    correct: Row | None = None
    again: bool = False
    hold: bool = False


def second_call_needed(solver: Solver, start: Start, n: int) -> bool:
    """Whether a singlestep start of `n` calls must evaluate its second node twice.

    The correction of the first step leaves the prediction at its end with an error O(h^2): enough for global order 3.
    """
    return start == "singlestep" and solver.convergence_order > 3 and n > 3


def make_plan(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    solver: Solver,
    x0_of: Callable[[float], tuple[float, float]],
    *,
    begin: int = 0,
    start: Start = "euler",
) -> list[Step]:
    """One `Step` per network call from node `begin` on.

    Args:
        schedule: path of the network.
        grid: nodes; one that stands twice is evaluated twice.
        solver: source of the rows.
        x0_of: half log-SNR -> (p, q) of `Step.x0`.
        begin: index of the first call (image-to-image); the warm-up starts there.
        start: `euler` makes a first-order first step. `singlestep` redoes it with the prediction made at its end,
            which costs nothing and is the two-stage step of DPM-Solver-2 (arXiv:2206.00927) with the first interval
            as its stage; solvers of order 4 also call the network a second time at the second node, and redo the
            first two intervals together (not from `begin` > 0, where the second call has been sliced off or is spent
            for nothing). Deterministic solvers only.
    """
    if start == "singlestep" and solver.eta:
        raise ValueError("start='singlestep' redoes a step and so needs a deterministic solver; use start='euler'")
    lam, n = grid.lambdas, len(grid.timesteps)
    steps: list[Step] = []
    known: list[float] = []  # nodes that carry a prediction, newest first
    anchor, used = math.nan, 0  # node the next correction starts from, and how many predictions its predictor used
    for i in range(begin, n):
        again = bool(known) and known[0] == lam[i]
        repeats_next = lam[i + 1] == lam[i]
        if not again:
            known.insert(0, lam[i])
        step = Step(x0_of(lam[i]), Row(1.0, ()), again=again)
        starting = start == "singlestep" and len(known) > 1 and (len(known) == 2 or anchor != known[1])
        if len(known) > 1 and not again and (solver.corrector or starting):
            row = solver.correct(lam[i], known[1 : 1 + used], anchor)
            step = replace(step, correct=_to_x(row, schedule, anchor, lam[i]))
        # A repeated call holds the anchor: the next correction spans both of the first two intervals.
        hold = repeats_next or again
        if not hold or not steps:
            anchor, used = lam[i], 0
        if not repeats_next:
            order = min(solver.order, len(known), n - i if n < solver.lower_final else n)
            step = replace(step, predict=_to_x(solver.predict(lam[i + 1], known[:order]), schedule, lam[i], lam[i + 1]))
            used = order
        steps.append(replace(step, hold=hold and bool(steps)))
    return steps


def table(steps: Sequence[Step], solver: Solver) -> FloatArray:
    """(n, 2 * order + 6) float64 coefficients: x0 (2), correct (1 + order + 1), predict (1 + order), noise (1)."""
    k = solver.order
    out = np.zeros((len(steps), 2 * k + 6))
    for line, step in zip(out, steps, strict=True):
        line[:2] = step.x0
        correct = step.correct or Row(0.0, ())
        line[2 : 3 + len(correct.m)] = correct.x, *correct.m
        line[k + 4 : k + 5 + len(step.predict.m)] = step.predict.x, *step.predict.m
        line[-1] = step.predict.noise
    return out


def _to_x(row: Row, schedule: NoiseSchedule, start: float, end: float) -> Row:
    return rescale(row, schedule.alpha_sigma(start)[0], schedule.alpha_sigma(end)[0])
