"""DualFast: any multistep solver with an older prediction mixed into its first-order term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffaccel.samplers.row import Row
from diffaccel.samplers.solver import Memory, Multistep, Node


@dataclass(frozen=True)
class DualFast:
    """DualFast (arXiv:2506.13058) around a multistep solver: less of the network's own error, at no extra call.

    The network errs more at low noise. In the first-order term the newest prediction m_0 becomes
    (1 + c) m_0 - c m_1, in whatever the solver keeps; differences of predictions stay what they were. Around DDIM on
    eps that is gradient estimation with gamma = 1 + c, but for the last step to sigma = 0, where c counts too.

    The paper's c_t and its choice of the older prediction are known to us from notes only (c_t grows as noise falls):
    here c_t = strength * alpha^2 / (alpha^2 + sigma^2) at the newest node, and the older prediction is the one before.

    Attributes:
        inner: the solver.
        strength: c at sigma = 0, >= 0; 0 is the solver itself.
    """

    inner: Multistep
    strength: float = 0.0

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"dual_fast must be 0 (off) or more, not {self.strength!r}")
        if self.inner.stochastic and self.inner.memory != "x0":
            raise ValueError("dual_fast would mix eps of different noise here; use a solver without noise, or on x0")

    @property
    def order(self) -> int:
        """Predictions used: the solver's, and at least the two that are mixed."""
        return max(2, self.inner.order)

    @property
    def convergence_order(self) -> int:
        """First: the first-order term is off by c times a difference of neighbours, O(h), on purpose."""
        return 1

    @property
    def corrector(self) -> bool:
        """The solver's."""
        return self.inner.corrector

    @property
    def can_correct(self) -> bool:
        """The solver's."""
        return self.inner.can_correct

    @property
    def stochastic(self) -> bool:
        """The solver's."""
        return self.inner.stochastic

    @property
    def lower_final(self) -> int:
        """The solver's."""
        return self.inner.lower_final

    @property
    def memory(self) -> Memory:
        """The solver's."""
        return self.inner.memory

    def predict(self, end: Node, nodes: Sequence[Node], order: int) -> Row:
        """The solver's row plus c times its first-order weight times m_0 - m_1."""
        row = self.inner.predict(end, nodes, min(order, self.inner.order))
        if len(nodes) < 2:
            return row
        first = self.inner.predict(end, nodes, 1)
        weight = first.m[0] if self.memory == "x0" else -first.x0 * nodes[0].frame_sigma(self.memory)
        extra = self.strength * nodes[0].alpha_bar * weight
        m = [*row.m, *[0.0] * (2 - len(row.m))]
        m[0] += extra
        m[1] -= extra
        return replace(row, m=tuple(m))

    def correct(self, node: Node, nodes: Sequence[Node], start: Node, order: int) -> Row:
        """The solver's: once the prediction at the end is known, nothing is extrapolated."""
        return self.inner.correct(node, nodes, start, min(order, self.inner.order))
