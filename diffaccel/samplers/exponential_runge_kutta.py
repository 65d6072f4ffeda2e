"""Exponential Runge-Kutta in half log-SNR: DPM-Solver-2S and -3S and their ++ forms, SEEDS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffaccel.samplers.ancestral import ancestral, renoised
from diffaccel.samplers.exponential import ExponentialAdams, Prediction
from diffaccel.samplers.row import Row
from diffaccel.samplers.solver import PURE_NOISE, Node


@dataclass(frozen=True)
class ExponentialRungeKutta:
    """Singlestep DPM-Solver and DPM-Solver++ of two or three stages (arXiv:2206.00927, arXiv:2211.01095); SEEDS.

    Each row integrates the polynomial through the newest prediction and the first one of the step: algorithms 4 and 5
    of DPM-Solver with stages at 1/2, and at 1/3 and 2/3 of the step in log-SNR. With `eta` = 1 it is SEEDS-2 and -3
    (arXiv:2305.14267), whose stages share the noise of one Brownian path.

    Attributes:
        stages: network calls of a full step, 2 or 3.
        prediction: `x0` (DPM-Solver++) or `epsilon` (DPM-Solver).
        second: rule of the two-stage step, `midpoint` as in the papers or `exact`; see `ExponentialAdams`.
        eta: noise of the reverse SDE, inside the step and its stages.
        ancestral: k-diffusion's eta: an ODE step further down, and noise after it.
    """

    stages: int = 2
    prediction: Prediction = "x0"
    second: Literal["midpoint", "exact"] = "midpoint"
    eta: float = 0.0
    ancestral: float = 0.0

    def __post_init__(self) -> None:
        if self.stages not in (2, 3):
            raise ValueError(f"stages must be 2 or 3, not {self.stages!r}")
        if not self.eta >= 0 or not self.ancestral >= 0 or (self.eta and self.ancestral):
            raise ValueError(
                "eta and ancestral must be 0 or more, and only one of them above 0; k-diffusion's eta is ancestral here"
            )

    @property
    def order(self) -> int:
        """Predictions that a row may use."""
        return self.stages

    @property
    def convergence_order(self) -> int:
        """Declared order of the global error, of its drift with `eta`; 1 with ancestral noise."""
        return 1 if self.ancestral else self.stages

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.eta > 0 or self.ancestral > 0

    @property
    def memory(self) -> Prediction:
        """What is kept of each network call."""
        return self.prediction

    def max_stages(self, start: Node, end: Node) -> int:
        """1 to sigma = 0, and from next to pure noise, where half of the step in log-SNR is still pure noise."""
        return 1 if math.isinf(end.lam) or start.ve_sigma > PURE_NOISE else self.stages

    def inner(self, nodes: Sequence[Node], i: int, stages: int) -> list[Node]:
        """Where the calls after the first are made in the step from nodes[i]."""
        start, end = nodes[i], self._landing(nodes, i)
        return [Node(start.lam + (end.lam - start.lam) * j / stages, start.schedule) for j in range(1, stages)]

    def rows(self, nodes: Sequence[Node], i: int, stages: int) -> list[Row]:
        """Row of each stage in the frame of the prediction."""
        start, end = nodes[i], self._landing(nodes, i)
        calls = [start, *self.inner(nodes, i, stages), end]
        rule = ExponentialAdams(
            order=2, second=self.second if stages == 2 else "exact", prediction=self.prediction, eta=self.eta
        )
        rows = [rule.interval(start, calls[1], [start], self.eta)]
        made = self._from_start(rule, calls, 0)
        for j in range(1, stages):
            row = self._from_start(rule, calls, j)
            rows.append(self._with_path_noise(row, made, calls[j], calls[j + 1]))
            made = row
        rows[-1] = renoised(rows[-1], end, nodes[i + 1], self.memory)
        return rows

    def _from_start(self, rule: ExponentialAdams, calls: Sequence[Node], j: int) -> Row:
        """Mean of the stage after call j, from the sample at the start of the step; newest prediction first."""
        start, target = calls[0], calls[j + 1]
        if j == 0:
            weights = rule.weights(start, target, [start], self.eta)
        else:
            newest, first = rule.weights(start, target, [calls[j], start], self.eta)
            weights = (newest, *[0.0] * (j - 1), first)
        kept = math.exp(-(1 + self.eta) * (target.lam - start.lam)) if self.prediction == "x0" else 1.0
        return Row(0.0, weights, anchor=kept)

    def _with_path_noise(self, row: Row, made: Row, now: Node, target: Node) -> Row:
        """Carry on the noise that the current sample has beyond its mean `made`, and add that of now -> target."""
        if not self.eta:
            return row
        h = target.lam - now.lam
        if self.prediction == "x0":
            carry, noise = math.exp(-(1 + self.eta) * h), math.sqrt(-math.expm1(-2 * self.eta * h))
        else:
            carry, noise = 1.0, math.sqrt(self.eta * math.expm1(2 * h))
        m = [row.m[0], *(w - carry * v for w, v in zip(row.m[1:], made.m, strict=True))]
        return Row(carry, tuple(m), target.ve_sigma * noise, anchor=row.anchor - carry * made.anchor)

    def _landing(self, nodes: Sequence[Node], i: int) -> Node:
        if math.isinf(nodes[i + 1].lam) or not self.ancestral:
            return nodes[i + 1]
        return ancestral(nodes[i], nodes[i + 1], self.ancestral)
