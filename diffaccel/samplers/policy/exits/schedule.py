"""How deep the network is at which noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffaccel.samplers.policy.plan import FULL, Grid, Plan


@dataclass(frozen=True)
class DepthSchedule:
    """A depth for each of several equal parts of the training time, from data to noise, as ASE writes it.

    `DepthSchedule((28, 28, 24, 24, 20, 20, 16, 16, 12, 12), 28)` is the one that ASE published: all 28 blocks below
    timestep 200, 12 from 800 on.

    Attributes:
        depths: one for each part of time.
        layers: depth of the whole network.
        train_timesteps: end of the time.
        mapped: whether each part of time has maps of its own, so that equal depths in two of them are two networks.
    """

    depths: tuple[int, ...]
    layers: int
    train_timesteps: float = 1000.0
    mapped: bool = False

    def __post_init__(self) -> None:
        if not self.depths or not all(isinstance(d, int) and 1 <= d <= self.layers for d in self.depths):
            raise ValueError(
                f"depths are whole numbers from 1 to {self.layers}, the whole network; not {list(self.depths)}"
            )

    def part(self, timestep: float) -> int:
        """Index of the part of time that a timestep lies in."""
        return min(len(self.depths) - 1, max(0, int(timestep * len(self.depths) / self.train_timesteps)))

    def depth(self, timestep: float) -> int:
        """Depth of the network at a timestep."""
        return self.depths[self.part(timestep)]

    def plan(self, grid: Grid, conditioning: Mapping[str, Any]) -> Plan:
        """One network a step, by its `name`."""
        return Plan.same([self.name(self.part(time)) for time in grid.training_times()])

    def name(self, part: int) -> str:
        """What the network of a part of time is called in plans and reports."""
        depth = self.depths[part]
        if depth == self.layers:
            return FULL
        return f"depth {depth}, part {part}" if self.mapped else f"depth {depth}"

    def exits(self) -> list[tuple[int, int]]:
        """(depth, part) of every exit that is not the whole network."""
        return [(depth, part) for part, depth in enumerate(self.depths) if depth < self.layers]


def best(
    errors: Sequence[Mapping[int, float]], costs: Sequence[Mapping[int, float]], limit: float
) -> tuple[tuple[int, ...], float]:
    """The depth of each part of time with the least sum of errors at a sum of costs of at most `limit`.

    A multiple-choice knapsack, solved exactly: of all choices for the first parts only those stay that no other beats
    in both sums.

    Args:
        errors: of each part of time, by depth.
        costs: likewise.
        limit: on the sum of costs.

    Returns:
        Depths, and the sum of their errors.

    Raises:
        ValueError: if the cheapest choice costs more; the message tells what it costs.
    """
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for error, cost in zip(errors, costs, strict=True):
        options = sorted((c + cost[d], e + error[d], (*chosen, d)) for c, e, chosen in front for d in error)
        front = []
        for option in options:
            if not front or option[1] < front[-1][1]:
                front.append(option)
    fitting = [option for option in front if option[0] <= limit * (1 + 1e-9)]
    if not fitting:
        raise ValueError(f"these exits bring the cost down to {front[0][0]:.4g} at best, not to {limit:.4g}")
    _, error, depths = fitting[-1]
    return depths, error
