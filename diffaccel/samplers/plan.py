"""Plan: everything scalar of a run, known before the first network call.

`config -> schedule -> grid -> rows -> step`: nothing downstream writes upstream. Because the grid is fixed before the
run, every coefficient is a plain float64 number here, which is what makes a run testable, searchable and compilable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from diffaccel.samplers.grid import TimeGrid
from diffaccel.samplers.row import Row, memory_coefficients, rescale
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.solver import PURE_NOISE, Multistep, Node, Singlestep

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Start = Literal["euler", "singlestep"]
X0Of = Callable[[float], tuple[float, float]]
TAKE_SAMPLE = Row(1.0, ())


@dataclass(frozen=True)
class Step:
    """What happens after one network call; rows are in the network's own x.

    Attributes:
        x0: (p, q) with x0 = p * sample + q * model_output.
        keep: (p, q) with what the solver remembers = p * sample + q * x0.
        predict: row from the (corrected) sample at this node to the next node.
        correct: row that replaces the sample before `predict`, or None when it is taken as it is.
        again: the call repeats the node before it, and its prediction replaces that node's.
        hold: the anchor stays where it is; otherwise it becomes the (corrected) sample.
    """

    x0: tuple[float, float]
    keep: tuple[float, float]
    predict: Row
    correct: Row | None = None
    again: bool = False
    hold: bool = False


def is_singlestep(solver: Multistep | Singlestep) -> TypeIs[Singlestep]:
    """Whether a solver's steps have stages."""
    return hasattr(solver, "stages")


def second_call_needed(solver: Multistep | Singlestep, start: Start, n: int) -> bool:
    """Whether a singlestep start of `n` calls must evaluate its second node twice.

    The correction of the first step leaves the prediction at its end with an error O(h^2): enough for global order 3.
    """
    return start == "singlestep" and solver.memory == "x0" and solver.convergence_order > 3 and n > 3


def make_plan(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    solver: Multistep | Singlestep,
    x0_of: X0Of,
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
            as its stage; x0 solvers of order 4 also call the network a second time at the second node, and redo the
            first two intervals together (not from `begin` > 0, where the second call has been sliced off or is spent
            for nothing). Deterministic multistep solvers only.
    """
    if is_singlestep(solver):
        if start == "singlestep":
            raise ValueError("this solver makes no first-order first step; leave start='singlestep' out")
        return _staged_plan(schedule, grid, solver, x0_of, begin)
    if start == "singlestep" and (solver.stochastic or not solver.can_correct):
        raise ValueError(
            "start='singlestep' redoes a step and so needs a deterministic solver that can correct; use start='euler'"
        )
    return _multistep_plan(schedule, grid, solver, x0_of, begin, start)


def _multistep_plan(
    schedule: NoiseSchedule, grid: TimeGrid, solver: Multistep, x0_of: X0Of, begin: int, start: Start
) -> list[Step]:
    nodes, n = [Node(v, schedule) for v in grid.lambdas], len(grid.timesteps)
    steps: list[Step] = []
    known: list[Node] = []  # those that carry a prediction, newest first
    anchor, used = nodes[begin], 0  # where the next correction starts, and how many predictions its predictor used
    for i in range(begin, n):
        node = nodes[i]
        again = bool(known) and known[0] == node
        repeats_next = nodes[i + 1] == node and i + 1 < n
        ends_here = nodes[i + 1] == node and i + 1 == n  # final="corrector": this call only redoes the last step
        if not again:
            known.insert(0, node)
        step = Step(x0_of(node.lam), _keep(solver, node), TAKE_SAMPLE, again=again)
        starting = start == "singlestep" and len(known) > 1 and (len(known) == 2 or anchor != known[1])
        if ends_here and not solver.can_correct:
            raise ValueError("final='corrector' needs a solver that can correct a step; use 'zero' or 'sigma_min'")
        # eps of pure noise says nothing of x0, and a correction would weigh it with sigma / alpha.
        blind = solver.memory == "epsilon" and anchor.ve_sigma > PURE_NOISE
        if len(known) > 1 and not again and (solver.corrector or starting or ends_here) and not blind:
            row = solver.correct(node, known[1:], anchor, used)
            step = replace(step, correct=_to_x(row, solver, node, node, anchor))
        # A repeated call holds the anchor: the next correction spans both of the first two intervals.
        hold = repeats_next or again
        if not hold or not steps:
            anchor, used = node, 0
        if not repeats_next and not ends_here:
            order = min(solver.order, len(known), n - i if n < solver.lower_final else n)
            row = solver.predict(nodes[i + 1], known, order)
            if step.correct is not None:
                row = _from_memory(row, node.frame_sigma(solver.memory))
            step, used = replace(step, predict=_to_x(row, solver, node, nodes[i + 1])), order
        steps.append(replace(step, hold=hold and bool(steps)))
    return steps


def _from_memory(row: Row, sigma: float) -> Row:
    """`row` with its x0 written as sample less sigma times what is kept.

    The x0 of a call is that of the sample the network saw. After a correction it no longer fits the sample, while eps
    and slope do not change.
    """
    first, *rest = row.m or (0.0,)
    return replace(row, x=row.x + row.x0, m=(first - row.x0 * sigma, *rest), x0=0.0) if row.x0 else row


def _staged_plan(schedule: NoiseSchedule, grid: TimeGrid, solver: Singlestep, x0_of: X0Of, begin: int) -> list[Step]:
    nodes = [Node(v, schedule) for v in grid.lambdas]
    starts = grid.starts()
    outer = [*(nodes[c] for c in starts), nodes[-1]]
    if outer[-1] == outer[-2]:
        raise ValueError("final='corrector' needs a multistep solver; use 'zero' or 'sigma_min'")
    steps: list[Step] = []
    for i, (first, count) in enumerate(zip(starts, grid.stages, strict=True)):
        if first < begin:  # image-to-image begins inside this step: its calls left are steps of their own
            inside = range(max(begin, first), first + count)
            chains = [([nodes[c], nodes[c + 1]], 0, c, 1) for c in inside]
        else:
            chains = [(outer, i, first, count)]
        for levels, at, c, stages in chains:
            start, end = levels[at], levels[at + 1]
            if end.lam <= start.lam:
                rows = [_lift(start, end)]
            else:
                ends = [*nodes[c + 1 : c + stages], end]
                rows = [
                    _to_x(row, solver, nodes[c + j], ends[j], start)
                    for j, row in enumerate(solver.rows(levels, at, stages))
                ]
            for j, in_x in enumerate(rows):
                here = nodes[c + j]
                step = Step(x0_of(here.lam), _keep(solver, here), TAKE_SAMPLE)
                if j:  # all but the noise goes into the row that may use the sample at the start of the step
                    step = replace(step, correct=replace(in_x, noise=0.0), predict=Row(1.0, (), in_x.noise), hold=True)
                else:
                    step = replace(step, predict=in_x)
                steps.append(step)
    return steps


def _lift(start: Node, end: Node) -> Row:
    """Row to a level of the same noise or more: what image-to-image leaves of a step with noise at its end."""
    return Row(end.alpha / start.alpha, (), end.alpha * max(0.0, end.ve_sigma**2 - start.ve_sigma**2) ** 0.5)


def _keep(solver: Multistep | Singlestep, node: Node) -> tuple[float, float]:
    alpha, sigma = node.schedule.alpha_sigma(node.lam)
    return memory_coefficients(solver.memory, alpha, sigma, node.schedule.path)


def _to_x(row: Row, solver: Multistep | Singlestep, start: Node, end: Node, anchor: Node | None = None) -> Row:
    """`row` in x, for a sample at `start`, and one held at `anchor`."""
    memory = solver.memory
    return rescale(row, start.frame(memory), end.frame(memory), (anchor or start).frame(memory))


class Layout:
    """Columns of the coefficient table of a solver that looks back `order` predictions."""

    def __init__(self, order: int) -> None:
        k = order
        self.x0, self.keep = slice(0, 2), slice(2, 4)
        self.correct = slice(4, k + 7)  # sample, anchor, k + 1 predictions
        self.predict = slice(k + 7, 2 * k + 9)  # sample, x0, k predictions
        self.noise, self.hold, self.width = 2 * k + 9, 2 * k + 10, 2 * k + 11


def table(steps: Sequence[Step], solver: Multistep | Singlestep) -> FloatArray:
    """(n, 2 * order + 11) float64 coefficients; see `Layout`."""
    layout = Layout(solver.order)
    out = np.zeros((len(steps), layout.width))
    for i, (line, step) in enumerate(zip(out, steps, strict=True)):
        line[layout.x0], line[layout.keep] = step.x0, step.keep
        # A run corrects or does not: a step left out takes the sample as it is. The first has nothing to redo.
        redoes = is_singlestep(solver) or (solver.corrector and i > 0)
        correct = step.correct or (TAKE_SAMPLE if redoes else Row(0.0, ()))
        _fill(line[layout.correct], (correct.x, correct.anchor, *correct.m))
        _fill(line[layout.predict], (step.predict.x, step.predict.x0, *step.predict.m))
        line[layout.noise], line[layout.hold] = step.predict.noise, step.hold
    return out


def _fill(line: FloatArray, values: Sequence[float]) -> None:
    line[: len(values)] = values
