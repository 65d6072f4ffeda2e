"""Gradient estimation: DDIM along an extrapolated noise prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffaccel.samplers.row import Row
from diffaccel.samplers.solver import Memory, Node, first_order


@dataclass(frozen=True)
class GradientEstimation:
    """Gradient-estimation sampler (Permenter and Yuan, arXiv:2306.04848, algorithm 2).

    eps_bar = gamma * eps_i + (1 - gamma) * eps_{i-1}, the first step takes eps itself. Of first order for every gamma
    but 3/2 on even steps in sigma: its extrapolation is for the error of the network, not of the integration. Schedule
    `gradient_estimation` is the one it was published with.

    Attributes:
        gamma: weight of the newest prediction, at least 1; 1 is DDIM, the paper uses 2.
        mu: share of noise, 0 (deterministic) to below 1: the step goes to
            sigma_p = (sigma_{i+1} / sigma_i^mu)^(1 / (1 - mu)), and noise lifts the sample to sigma_{i+1}.
            0.5 is DDPM-like.
    """

    gamma: float = 2.0
    mu: float = 0.0

    def __post_init__(self) -> None:
        if not self.gamma >= 1:
            raise ValueError(f"gamma must be 1 (DDIM) or more, not {self.gamma!r}")
        if not 0 <= self.mu < 1:
            raise ValueError(f"mu must lie between 0 (no noise) and 1, 1 excluded, not {self.mu!r}")

    @property
    def order(self) -> int:
        """Predictions used."""
        return 2

    @property
    def convergence_order(self) -> int:
        """First."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.mu > 0

    @property
    def memory(self) -> Memory:
        """Predictions of eps."""
        return "epsilon"

    @property
    def corrector(self) -> bool:
        """Never."""
        return False

    @property
    def can_correct(self) -> bool:
        """No rule is known."""
        return False

    @property
    def lower_final(self) -> int:
        """Never: the order is 1."""
        return 0

    def predict(self, end: Node, nodes: Sequence[Node], order: int) -> Row:
        """Row from nodes[0] to `end`; at sigma = 0 the average does not count: the run ends on the x0 prediction."""
        sigma = nodes[0].ve_sigma
        if math.isinf(end.lam):
            return Row(0.0, (), x0=1.0)
        down = (end.ve_sigma / sigma**self.mu) ** (1 / (1 - self.mu))
        row, noise = first_order(sigma, down), math.sqrt(max(0.0, end.ve_sigma**2 - down**2))
        if order < 2:
            return Row(row.x, (), noise, row.x0)
        extra = (down - sigma) * (self.gamma - 1)
        return Row(row.x, (extra, -extra), noise, row.x0)

    def correct(self, node: Node, nodes: Sequence[Node], start: Node, order: int) -> Row:
        """Refuse: see `can_correct`."""
        raise NotImplementedError("gradient estimation has no corrector")
