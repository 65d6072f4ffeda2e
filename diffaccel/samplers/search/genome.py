"""The decisions of a unified sampler: what each step of a run does, and the table that a list of them makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from diffaccel.samplers.adams_bashforth import AdamsBashforth
from diffaccel.samplers.er_sde import ERSDE
from diffaccel.samplers.exponential import ExponentialAdams, Prediction
from diffaccel.samplers.grid import TimeGrid
from diffaccel.samplers.row import Row, memory_coefficients, rescale
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.solver import PURE_NOISE, Memory, Multistep, Node
from diffaccel.samplers.tabulate import Table, grid_of

Estimate = Literal["exact", "midpoint", "bh1", "sigma"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
ESTIMATES: tuple[Estimate, ...] = get_args(Estimate)
MOST_POINTS = 3


@dataclass(frozen=True)
class Decision:
    """What one step does.

    Attributes:
        order: predictions that it uses, 1 to 3; fewer where there are not so many yet.
        prediction: what is interpolated, `x0` or `epsilon`.
        estimate: how its derivatives are found. `exact`, `midpoint` (UniPC's bh2) and `bh1` are those of
            `ExponentialAdams`, on polynomials in half log-SNR; `sigma` is a polynomial in sigma / alpha: ER-SDE's ODE
            of x0, DEIS's rho-AB of eps (on flow paths of the velocity, in sigma).
        corrector: redo the step with the prediction at its end, by the same rule with one more point (UniC).
    """

    order: int = 2
    prediction: Prediction = "x0"
    estimate: Estimate = "midpoint"
    corrector: bool = False

    @property
    def solver(self) -> Multistep:
        """The rule that makes this step."""
        return _solver(self.order, self.prediction, self.estimate)


@cache
def _solver(order: int, prediction: Prediction, estimate: Estimate) -> Multistep:
    if estimate != "sigma":
        return ExponentialAdams(order=order, prediction=prediction, second=estimate)
    return ERSDE(order=order, noise_scale="ode") if prediction == "x0" else AdamsBashforth(order)


@dataclass(frozen=True)
class Genome:
    """A run: where the network is called, and what each step does with all that is known.

    Attributes:
        lambdas: (n,) half log-SNR of the calls, increasing.
        decisions: (n,), of the step from each call.
        end: half log-SNR at the end of the run; inf is sigma = 0.
    """

    lambdas: tuple[float, ...]
    decisions: tuple[Decision, ...]
    end: float = math.inf

    def table(self, schedule: NoiseSchedule) -> Table:
        """The sampler."""
        return compose(schedule, grid_of(schedule, self.lambdas, self.end), self.decisions)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words; an end of None is sigma = 0."""
        return {
            "lambdas": list(self.lambdas),
            "end": None if math.isinf(self.end) else self.end,
            "decisions": [[d.order, d.prediction, d.estimate, d.corrector] for d in self.decisions],
        }

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Genome:
        """What `to_json` said."""
        end = math.inf if said["end"] is None else float(said["end"])
        return cls(tuple(said["lambdas"]), tuple(Decision(*one) for one in said["decisions"]), end)


def compose(schedule: NoiseSchedule, grid: TimeGrid, decisions: Sequence[Decision]) -> Table:
    """The table of a run whose steps follow different rules, on symbols as `tabulate` does.

    A correction belongs to the decision of the step that it redoes. What a call contributes to a later step is its x0,
    or the eps of it and the sample that the network saw, whichever the rule of that step interpolates.
    """
    nodes = [Node(lam, schedule) for lam in grid.lambdas]
    n = len(decisions)
    states = [np.eye(1, n + 1)[0]]  # samples x that the network sees, over the first of them and all x0 predictions
    anchor, used = states[0], 0
    for i in range(n):
        node, x = nodes[i], states[-1]
        if i and decisions[i - 1].corrector and not _blind(decisions[i - 1], nodes[i - 1]):
            solver = decisions[i - 1].solver
            row = solver.correct(node, nodes[i - 1 :: -1], nodes[i - 1], used)
            row = rescale(row, node.frame(solver.memory), node.frame(solver.memory), nodes[i - 1].frame(solver.memory))
            x = _combined(row, x, anchor, _memory(solver.memory, nodes[i::-1], states), 0.0)
        anchor, solver = x, decisions[i].solver
        used = min(solver.order, i + 1)
        kept = _memory(solver.memory, nodes[i::-1], states)
        p, q = _coefficients(solver.memory, node)
        row = rescale(
            solver.predict(nodes[i + 1], nodes[i::-1], used),
            node.frame(solver.memory),
            nodes[i + 1].frame(solver.memory),
        )
        # After a correction eps and slope still hold, and the x0 that goes with them is another one.
        states.append(_combined(row, x, anchor, kept, (kept[0] - p * x) / q))
    return Table(grid, _rows(schedule, grid, states))


def _blind(decision: Decision, start: Node) -> bool:
    """Eps of pure noise says nothing of x0, and a correction would weigh it with sigma / alpha."""
    return decision.solver.memory == "epsilon" and start.ve_sigma > PURE_NOISE


def _coefficients(memory: Memory, node: Node) -> tuple[float, float]:
    return memory_coefficients(memory, *node.schedule.alpha_sigma(node.lam), node.schedule.path)


def _memory(memory: Memory, nodes: Sequence[Node], states: Sequence[FloatArray]) -> list[FloatArray]:
    """What a rule keeps of the calls at `nodes`, newest first; the last of the states is what the newest call saw."""
    newest, out = len(nodes) - 1, []
    for j, node in enumerate(nodes):
        p, q = _coefficients(memory, node)
        out.append(p * states[newest - j] + q * np.eye(1, len(states[0]), 1 + newest - j)[0])
    return out


def _combined(
    row: Row, x: FloatArray, anchor: FloatArray, kept: Sequence[FloatArray], x0: FloatArray | float
) -> FloatArray:
    out = row.x * x + row.anchor * anchor + row.x0 * x0
    return out + sum((w * k for w, k in zip(row.m, kept, strict=False)), np.zeros_like(x))


def _rows(schedule: NoiseSchedule, grid: TimeGrid, states: Sequence[FloatArray]) -> tuple[tuple[float, ...], ...]:
    """From states in x to steps between them in y = x / alpha."""
    ys = [x / schedule.alpha_sigma(lam)[0] for x, lam in zip(states, grid.lambdas, strict=True)]
    rows = []
    for i, (y, end) in enumerate(pairwise(ys)):
        kept = end[0] / y[0] if y[0] else 0.0
        rows.append((float(kept), *map(float, (end - kept * y)[i + 1 : 0 : -1])))
    return tuple(rows)
