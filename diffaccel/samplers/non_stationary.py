"""Non-stationary solvers: one table of weights for a run of n calls, which every linear deterministic solver is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffaccel.samplers.row import Row
from diffaccel.samplers.solver import Memory, Node

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class NonStationary:
    """One row of weights for each step, in y = x / alpha and the predictions of x0, the newest first.

        y_{i+1} = rows[i][0] * y_i + sum over j of rows[i][1 + j] * x0_{i-j}

    Bespoke non-stationary solvers (arXiv:2403.01329, eq. 9), and what searches return: any weights on all that is known
    by then, the newest prediction first. DDIM, Adams methods, DPM-Solver++, UniPC with its corrector, Runge-Kutta
    methods, compensation: on one grid each of them is such a table.

    Attributes:
        rows: row i has i + 2 finite numbers.
    """

    rows: Rows

    def __post_init__(self) -> None:
        if not self.rows or any(len(row) != i + 2 for i, row in enumerate(self.rows)):
            raise ValueError(
                "row i of a table of weights (from 0) has i + 2 numbers: of the sample and of i + 1 predictions"
            )

    @property
    def order(self) -> int:
        """All calls of the run are kept."""
        return len(self.rows)

    @property
    def convergence_order(self) -> int:
        """None to speak of: a table is for one grid, which cannot be refined."""
        return 0

    @property
    def stochastic(self) -> bool:
        """Never."""
        return False

    @property
    def memory(self) -> Memory:
        """Predictions of x0."""
        return "x0"

    @property
    def corrector(self) -> bool:
        """Never: a corrected step is weights of the next one."""
        return False

    @property
    def can_correct(self) -> bool:
        """Never."""
        return False

    @property
    def lower_final(self) -> int:
        """Never."""
        return 0

    def predict(self, end: Node, nodes: Sequence[Node], order: int) -> Row:
        """Row of the step from nodes[0], which is as many steps into the run as there are nodes before it."""
        first, *rest = self.rows[len(nodes) - 1]
        return Row(first, tuple(rest))

    def correct(self, node: Node, nodes: Sequence[Node], start: Node, order: int) -> Row:
        """Not there."""
        raise ValueError("a table of weights has no rule to correct a step; use final='zero' or 'sigma_min'")
