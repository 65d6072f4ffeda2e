"""Accelerated DDPM: noise before and after each score evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffaccel.samplers.row import Row
from diffaccel.samplers.solver import Memory, Node


@dataclass(frozen=True)
class AcceleratedDDPM:
    """Accelerated stochastic sampler of Li et al. (arXiv:2403.03852); its ODE partner is `accelerated_ddim`.

    y = x_t + sqrt((1 - a) / 2) z, x_{t-1} = (y + (1 - a) s(y)) / sqrt(a) + sqrt((1 - a) / 2) z+, where a is the
    ratio of neighbouring alpha-bars. A scheduler cannot touch the sample before the network sees it: the
    noise before a call is drawn together with the one after the call before it, which is the same law; the first call
    goes without. The last step is the x0 prediction, without the z+ that would leave noise. It is no exponential
    integrator, and trails DDIM at few calls.
    """

    @property
    def stages(self) -> int:
        """One call a step."""
        return 1

    @property
    def order(self) -> int:
        """Nothing is kept: the row is in the sample and x0."""
        return 1

    @property
    def convergence_order(self) -> int:
        """First, of its drift."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Always."""
        return True

    @property
    def memory(self) -> Memory:
        """Predictions of x0."""
        return "x0"

    def max_stages(self, start: Node, end: Node) -> int:
        """One."""
        return 1

    def inner(self, nodes: Sequence[Node], i: int, stages: int) -> list[Node]:
        """None: one call a step."""
        return []

    def rows(self, nodes: Sequence[Node], i: int, stages: int) -> list[Row]:
        """Row from nodes[i] to nodes[i + 1] in y = x / alpha, where s = -eps / sigma is an x0 prediction."""
        if math.isinf(nodes[i + 1].lam):
            return [Row(0.0, (1.0,))]
        lost = 1 - _ratio(nodes[i], nodes[i + 1])
        share = lost / (1 - nodes[i].alpha_bar)
        next_lost = 1 - _ratio(nodes[i + 1], nodes[i + 2]) if i + 2 < len(nodes) else 0.0
        noise = math.sqrt((lost + next_lost) / 2 / nodes[i + 1].alpha_bar)
        return [Row(1 - share, (share,), noise)]


def _ratio(node: Node, after: Node) -> float:
    """alpha_t of the step."""
    return node.alpha_bar / after.alpha_bar
