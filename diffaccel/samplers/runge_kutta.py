"""Singlestep solvers: several network calls a step, nothing kept from one step to the next.

Runge-Kutta in Diffusers' sigma (rho-RK of DEIS, Heun of EDM) and exponential Runge-Kutta
in half log-SNR (DPM-Solver-2S and -3S, SEEDS), both as ODE solvers and with noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from diffaccel.samplers.exponential import ExponentialAdams, Prediction
from diffaccel.samplers.row import Row
from diffaccel.samplers.solver import Memory, Node, first_order


@dataclass(frozen=True)
class Tableau:
    """Explicit Butcher tableau: stage positions c, weights a of the earlier slopes, weights b of the step, order."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int


TABLEAUS = {
    "euler": Tableau((0,), ((),), (1,), 1),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2), 2),
    "kutta3": Tableau((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 4 / 6, 1 / 6), 3),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4), 3),
    "rk4": Tableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
}


@dataclass(frozen=True)
class RungeKutta:
    """Explicit Runge-Kutta on the slope in Diffusers' sigma: rho-RK of DEIS (arXiv:2204.13902, section 3.3).

    `heun` is EDM's deterministic sampler (arXiv:2206.00364, algorithm 1), with `s_churn` its stochastic one
    (algorithm 2); `euler` with `eta` = 1 is k-diffusion's Euler ancestral. The last step to sigma = 0 has one stage, as
    in EDM. On VP and VE paths a step that starts above sigma = 100 has one too: there a step in sigma is a poor
    idea (DEIS from 152 is off by its own size below 15 calls), and one stage is DDIM, exact up to 1 / sigma.

    EDM raises the noise before a call, which a scheduler cannot: here the *grid* holds the raised levels, and each step
    goes down to its end divided by 1 + gamma and comes back up. That is the same sampler on levels 1 + gamma lower.

    Attributes:
        tableau: a name in `TABLEAUS`.
        eta: ancestral noise (k-diffusion): 1 replaces the noise as the reverse SDE does, 0 none.
        s_churn, s_tmin, s_tmax, s_noise: EDM's, gamma = min(s_churn / steps, sqrt(2) - 1) where the raised sigma is in
            the range.
    """

    tableau: str = "heun"
    eta: float = 0.0
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.tableau not in TABLEAUS:
            raise ValueError(f"unknown tableau {self.tableau!r}; use {', '.join(TABLEAUS)}")
        if not self.eta >= 0 or not self.s_churn >= 0:
            raise ValueError(f"eta and s_churn must be 0 or more, not {self.eta!r} and {self.s_churn!r}")

    @property
    def stages(self) -> int:
        """Network calls of a full step."""
        return len(TABLEAUS[self.tableau].c)

    @property
    def order(self) -> int:
        """Slopes that a row uses."""
        return self.stages

    @property
    def convergence_order(self) -> int:
        """Declared order of the global error; 1 with noise, which comes after the step and not inside it."""
        return 1 if self.stochastic else TABLEAUS[self.tableau].order

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.eta > 0 or self.s_churn > 0

    @property
    def memory(self) -> Memory:
        """Slopes."""
        return "slope"

    def max_stages(self, start: Node, end: Node) -> int:
        """1 to sigma = 0 and from sigma > 100, `stages` otherwise."""
        huge = start.schedule.path != "flow" and start.ve_sigma > 100
        return 1 if math.isinf(end.lam) or huge else self.stages

    def inner(self, nodes: Sequence[Node], i: int, stages: int) -> list[Node]:
        """Where the calls after the first are made in the step from nodes[i]."""
        start, end = nodes[i], self._landing(nodes, i)
        return [self._at(start, end, c) for c in self._rule(stages).c[1:]]

    def rows(self, nodes: Sequence[Node], i: int, stages: int) -> list[Row]:
        """Row of each stage in the frame of the slope."""
        start, end, rule = nodes[i], self._landing(nodes, i), self._rule(stages)
        h = end.sigma - start.sigma
        rows = [first_order(start.sigma, self._at(start, end, (*rule.c, 1.0)[1]).sigma)]
        for a in (*rule.a[2:], rule.b)[: stages - 1]:
            rows.append(Row(0.0, tuple(h * w for w in reversed(a)), anchor=1.0))
        rows[-1] = renoised(rows[-1], end, nodes[i + 1], self.memory, self.s_noise)
        return rows

    def _rule(self, stages: int) -> Tableau:
        """The tableau, or one of fewer stages where the plan has no calls for all of them."""
        smaller = {1: "euler", 2: "heun", 3: "kutta3"}
        return TABLEAUS[self.tableau if stages == self.stages else smaller[stages]]

    def _at(self, start: Node, end: Node, c: float) -> Node:
        if c == 1:
            return end
        sigma = start.sigma + c * (end.sigma - start.sigma)
        return Node(float(start.schedule.lambda_of_sigma(sigma)), start.schedule)

    def _landing(self, nodes: Sequence[Node], i: int) -> Node:
        """Where the ODE step ends, before noise lifts the sample to nodes[i + 1]."""
        start, end = nodes[i], nodes[i + 1]
        if math.isinf(end.lam):
            return end
        if self.eta:
            return ancestral(start, end, self.eta)
        last = i + 2 >= len(nodes)
        if self.s_churn and not last and self.s_tmin <= end.sigma <= self.s_tmax:
            gamma = min(self.s_churn / (len(nodes) - 1), math.sqrt(2) - 1)
            return Node(end.lam + math.log1p(gamma), end.schedule)
        return end


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
            raise ValueError("eta and ancestral must be 0 or more, and only one of them above 0")

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
        return 1 if math.isinf(end.lam) or start.ve_sigma > 1000 else self.stages

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


def ancestral(start: Node, end: Node, eta: float) -> Node:
    """Level to step down to, so that noise lifts the sample to `end`: k-diffusion's `get_ancestral_step`.

    In sigma / alpha on every path: sigma_up = min(end, eta * end * sqrt(1 - (end / start)^2)).
    """
    up = min(1.0, eta * math.sqrt(-math.expm1(2 * (start.lam - end.lam))))
    # All noise replaced: land as close to x0 as floats allow.
    return Node(end.lam - 0.5 * math.log(max(1 - up**2, 1e-16)), end.schedule)


def renoised(row: Row, landed: Node, end: Node, memory: Memory, s_noise: float = 1.0) -> Row:
    """Continue `row`, which lands at `landed`, with noise up to `end`."""
    if math.isinf(landed.lam) or landed.lam <= end.lam:
        return row
    # x = alpha * y at both levels, and the row is in units of its frame.
    scale = end.alpha / landed.alpha * landed.frame(memory) / end.frame(memory)
    added = math.sqrt(end.ve_sigma**2 - landed.ve_sigma**2) * end.alpha / end.frame(memory)
    noise = math.hypot(row.noise * scale, s_noise * added)
    return replace(
        row,
        x=row.x * scale,
        m=tuple(scale * w for w in row.m),
        noise=noise,
        x0=row.x0 * scale,
        anchor=row.anchor * scale,
    )
