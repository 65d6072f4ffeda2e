"""Adams-Bashforth methods on the slope or the noise: DEIS (t-AB, rho-AB), iPNDM, LMS, accelerated DDIM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffaccel.samplers.row import Row
from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.solver import Memory, Node, correction, differences, first_order, point_weights

Variable = Literal["sigma", "time", "alpha_bar"]
LARGEST_WEIGHTS = 1e4  # sum of weights, in steps, from which on a polynomial of that degree is lowered
UNIFORM = {  # weights on evenly spaced nodes, newest first, in units of the step
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class AdamsBashforth:
    """Explicit Adams method: the slope is a polynomial through the last `order` predictions, integrated exactly.

    The polynomial is in one of three variables:

    - `sigma`, Diffusers' sigma: rho-AB of DEIS (arXiv:2204.13902), k-diffusion's LMS, and iPNDM with
      variable steps. The closed forms in circulation for the last (`ipndm_v` of ComfyUI and diff-sampler) are wrong
      from order 3 on; these weights are the exact integrals on any grid.
    - `time`, the network's clock: t-AB of DEIS, the paper's own; order k + 1 is its tAB-k. On flow paths
      it is rho-AB, for EDM and SVD a polynomial in log sigma: their clocks. The integrals are
      by Gauss-Legendre quadrature, not by its 10,000-point left Riemann sum.
    - `alpha_bar`: eps linear in alpha^2 / (alpha^2 + sigma^2) is accelerated DDIM (arXiv:2403.03852).

    All go to sigma = 0 on every grid, where Diffusers' DEIS stops at the smallest trained noise. Where a step is so
    much longer than those before it that the weights pass 10,000 steps, the order of that step is lowered.

    Attributes:
        order: predictions used, 1 to 4; order 1 is DDIM.
        variable: what the polynomial is in.
        uniform: weights of evenly spaced nodes whatever the spacing, as iPNDM has them (arXiv:2204.13902).
            Of second order only on other grids, and on pictures often the better one.
    """

    order: int = 3
    variable: Variable = "sigma"
    uniform: bool = False
    corrector: bool = False
    lower_final: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise ValueError(f"order must be 1, 2, 3 or 4, not {self.order!r}")
        if self.variable not in MOMENTS:
            raise ValueError(f"unknown variable {self.variable!r}; use {', '.join(MOMENTS)}")
        if self.uniform and (self.corrector or self.variable != "sigma"):
            raise ValueError("uniform weights are iPNDM's: use variable='sigma' and no corrector with them")

    @property
    def convergence_order(self) -> int:
        """Declared order of the global error, on any grid."""
        return min(self.order, 2) if self.uniform else self.order + self.corrector

    @property
    def stochastic(self) -> bool:
        """Never."""
        return False

    @property
    def memory(self) -> Memory:
        """Alpha-bar belongs to the VP path: its eps is kept; the others keep the slope of the path at hand."""
        return "epsilon" if self.variable == "alpha_bar" else "slope"

    @property
    def can_correct(self) -> bool:
        """With exact weights the implicit rule (Adams-Moulton) is the same polynomial with one more point."""
        return not self.uniform

    def predict(self, end: Node, nodes: Sequence[Node], order: int) -> Row:
        """Row from nodes[0] to `end`, sigma = 0 included."""
        start, end_sigma = nodes[0].frame_sigma(self.memory), end.frame_sigma(self.memory)
        row = first_order(start, end_sigma)
        h = end_sigma - start
        if self.uniform:
            first, *rest = UNIFORM[order]
            return Row(row.x, (h * (first - 1), *(h * w for w in rest)), x0=row.x0)
        weights = differences(*self._problem(nodes[0], end, self._sane(nodes[0], end, nodes[:order])))
        return Row(row.x, weights, x0=row.x0)

    def correct(self, node: Node, nodes: Sequence[Node], start: Node, order: int) -> Row:
        """Adams-Moulton through node, nodes[0], ... less the predictor's weights: what the step still lacks."""
        known = self._sane(start, node, nodes[:order])
        redone = point_weights(*self._problem(start, node, [node, *known]))
        return correction(redone, point_weights(*self._problem(start, node, known)))

    def _sane(self, start: Node, end: Node, nodes: Sequence[Node]) -> Sequence[Node]:
        """The nodes, less the oldest ones where the step is far too long to extrapolate through them."""
        h = abs(end.frame_sigma(self.memory) - start.frame_sigma(self.memory))
        while len(nodes) > 1 and sum(map(abs, point_weights(*self._problem(start, end, nodes)))) > LARGEST_WEIGHTS * h:
            nodes = nodes[:-1]
        return nodes

    def _problem(self, start: Node, end: Node, nodes: Sequence[Node]) -> tuple[FloatArray, list[float]]:
        """Moments of the step and offsets of its nodes, in the variable of the polynomial."""
        value, moments = MOMENTS[self.variable]
        zero = value(start)
        return moments(start, end, len(nodes)), [value(n) - zero for n in nodes]


def _sigma_moments(start: Node, end: Node, n: int) -> FloatArray:
    """Return int (s - s_0)^k ds = h^(k+1) / (k + 1)."""
    h = end.sigma - start.sigma
    return np.array([h ** (k + 1) / (k + 1) for k in range(n)])


def _alpha_bar_moments(start: Node, end: Node, n: int) -> FloatArray:
    """Return int (alpha_bar - alpha_bar_0)^k ds over s = sigma / alpha; alpha_bar = cos^2(arctan s)."""
    theta, weights = _gauss(math.atan(start.ve_sigma), math.atan(end.ve_sigma))
    v = np.cos(theta) ** 2 - start.alpha_bar
    return np.array([(weights * v**k / np.cos(theta) ** 2).sum() for k in range(n)])


def _time_moments(start: Node, end: Node, n: int) -> FloatArray:
    """Return int (t - t_0)^k ds; below the trained noise t stays what it is there."""
    if start.schedule.path == "flow":  # the clock is T * sigma
        return _sigma_moments(start, end, n) * start.schedule.times[-1] ** np.arange(n)
    last = min(end.lam, float(start.schedule.lambda_at(start.schedule.times[0])))
    sigma_at, time_at = start.schedule.sigma_at, start.schedule.time_at
    lam, weights = _gauss(start.lam, last)
    weights = -weights * sigma_at(lam)  # ds = -s dlambda
    v = time_at(lam) - start.time
    below, least = end.sigma - float(sigma_at(last)), float(time_at(last)) - start.time
    return np.array([(weights * v**k).sum() + below * least**k for k in range(n)])


def _gauss(a: float, b: float, panels: int = 8) -> tuple[FloatArray, FloatArray]:
    """Points and weights of composite Gauss-Legendre quadrature over [a, b], 16 points a panel."""
    x, w = np.polynomial.legendre.leggauss(16)
    edges = np.linspace(a, b, panels + 1)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (x + 1)).ravel(), (half * w).ravel()


MOMENTS: dict[str, tuple[Callable[[Node], float], Callable[[Node, Node, int], FloatArray]]] = {
    "sigma": (lambda node: node.sigma, _sigma_moments),
    "time": (lambda node: node.time, _time_moments),
    "alpha_bar": (lambda node: node.alpha_bar, _alpha_bar_moments),
}
