"""Runge-Kutta in Diffusers' sigma: rho-RK of DEIS, Heun of EDM, Euler ancestral; with and without noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffaccel.samplers.ancestral import ancestral, renoised
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
    """Explicit Runge-Kutta on the slope in Diffusers' sigma: rho-RK of DEIS (arXiv:2204.13902).

    `heun` is EDM's deterministic sampler (arXiv:2206.00364, algorithm 1), with `s_churn` its stochastic one
    (algorithm 2); `euler` with `eta` = 1 is k-diffusion's Euler ancestral. The last step to sigma = 0 has one stage, as
    in EDM. On VP and VE paths a step that starts above sigma = 100 has one too: there a step in sigma is a poor
    idea (DEIS from 152 is off by its own size below 15 calls), and one stage is DDIM, exact up to 1 / sigma.

    EDM raises the noise before a call, which a scheduler cannot: here the *grid* holds the raised levels, and each step
    goes down to its end divided by 1 + gamma and comes back up. That is the same sampler on levels 1 + gamma lower.

    Attributes:
        tableau: a name in `TABLEAUS`.
        eta: ancestral noise (k-diffusion): 1 replaces the noise as the reverse SDE does, 0 none. On flow paths too it
            is taken in sigma / alpha; ComfyUI's rule for those goes down in sigma, and is another sampler.
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
