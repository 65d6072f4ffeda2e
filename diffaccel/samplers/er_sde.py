"""ER-SDE solvers: the extended reverse-time SDE with a chosen noise scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from diffaccel.samplers.row import Row
from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.solver import Memory, Node, correction, point_weights

# phi(x) of sigma / alpha, by the names of the authors' code. A phi is valid where phi(x) / x does not fall.
NOISE_SCALES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "ode": lambda x: x,
    "sde": lambda x: x**2,
    "sde_1": lambda x: x * (np.exp(-1 / x) + 10),
    "sde_2": lambda x: x**1.5,
    "sde_3": lambda x: x**2.5,
    "sde_4": lambda x: x * (y := np.minimum(x, 1022.0)) ** -0.1 * np.log10(1 + 100 * y**1.5),  # falls beyond
    "sde_5": lambda x: x * (np.exp(np.minimum(x**0.3, 600)) + 10),  # at pure noise exp would overflow, and 1 / phi is 0
}


@dataclass(frozen=True)
class ERSDE:
    """ER-SDE-Solver of order 1 to 3 (arXiv:2309.06169, algorithms 1 to 3), on VP, VE and flow paths.

    The x0 predictions are a polynomial in s = sigma / alpha, integrated exactly. The authors' code sums 100 left
    rectangles and takes the last difference for the derivative, so that its order 3 is second order at most; ours
    reaches 3. Its sigma = 0 on VP paths, NaN there, is the x0 prediction here.

    Attributes:
        order: predictions used, 1 to 3.
        noise_scale: a name in `NOISE_SCALES`; `sde_5` is the paper's choice, `ode` the probability flow.
    """

    order: int = 3
    noise_scale: str = "sde_5"
    corrector: bool = False
    lower_final: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 3:
            raise ValueError(f"order must be 1, 2 or 3, not {self.order!r}")
        if self.noise_scale not in NOISE_SCALES:
            raise ValueError(f"unknown noise_scale {self.noise_scale!r}; use {', '.join(NOISE_SCALES)}")

    @property
    def convergence_order(self) -> int:
        """Declared order of the global error; of its drift, where there is noise."""
        return self.order + self.corrector

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.noise_scale != "ode"

    @property
    def memory(self) -> Memory:
        """Predictions of x0."""
        return "x0"

    @property
    def can_correct(self) -> bool:
        """Always: the same polynomial with one more point."""
        return True

    def predict(self, end: Node, nodes: Sequence[Node], order: int) -> Row:
        """Row from nodes[0] to `end`."""
        if math.isinf(end.lam):
            return Row(0.0, (1.0,))
        a, b = end.ve_sigma, nodes[0].ve_sigma
        kept = self._ratio(a, b)
        # Without noise the difference is rounding, whose root would not be small.
        noise = math.sqrt(max(0.0, a**2 - b**2 * kept**2)) if self.stochastic else 0.0
        return Row(kept, self._weights(nodes[0], end, nodes[:order]), noise)

    def correct(self, node: Node, nodes: Sequence[Node], start: Node, order: int) -> Row:
        """What the step lacks of the polynomial through the prediction at its end; it keeps its noise."""
        redone = self._weights(start, node, [node, *nodes[:order]])
        return correction(redone, self._weights(start, node, nodes[:order]))

    def _ratio(self, a: float, b: float) -> float:
        phi = NOISE_SCALES[self.noise_scale]
        return float(phi(np.array(a)) / phi(np.array(b)))

    def _weights(self, start: Node, end: Node, nodes: Sequence[Node]) -> tuple[float, ...]:
        """Weights of the polynomial through the predictions at `nodes` in y' = r y + int K(x) x0(x) dx.

        By parts the moments of K are M_0 = 1 - r and M_k = (a - b)^k + k phi(a) int_a^b (x - b)^(k-1) / phi(x) dx.
        """
        a, b = end.ve_sigma, start.ve_sigma
        phi = NOISE_SCALES[self.noise_scale]
        x, w = _log_gauss(a, b)
        share = w * phi(np.array(a)) / phi(x)
        moments = [1 - self._ratio(a, b)]
        moments += [(a - b) ** k + k * float((share * (x - b) ** (k - 1)).sum()) for k in range(1, len(nodes))]
        return point_weights(np.array(moments), [n.ve_sigma - b for n in nodes])


def _log_gauss(a: float, b: float) -> tuple[FloatArray, FloatArray]:
    """Points and weights of Gauss-Legendre quadrature over [a, b] in log x, 16 a panel of at most one e-fold."""
    t, w = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(math.log(a), math.log(b), max(1, math.ceil(math.log(b / a))) + 1)
    half = np.diff(edges)[:, None] / 2
    x = np.exp((edges[:-1, None] + half * (t + 1)).ravel())
    return x, (half * w).ravel() * x
