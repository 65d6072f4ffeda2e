"""Solvers: pure functions from log-SNR nodes to a Row of scalars. No tensors, pipelines, devices or configs.

Solvers work on y = x / alpha = x0 + exp(-lambda) * eps. In y the VP, VE and rectified-flow paths are one and the same
curve, so that a solver sees half log-SNR only; the path enters once, when a row is rescaled from y to x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from diffaccel.samplers.row import Row
from diffaccel.samplers.schedule import FloatArray

SecondOrder = Literal["exact", "midpoint", "bh1"]


class Solver(Protocol):
    """What the plan of a trajectory asks of a solver. Implementations are frozen, hashable values."""

    @property
    def order(self) -> int:
        """Predictions a predictor row uses once the history is full."""
        ...

    @property
    def convergence_order(self) -> int:
        """Declared order of the global error, checked by `tests/samplers/test_order.py`."""
        ...

    @property
    def corrector(self) -> bool:
        """Whether every step is redone once the prediction at its end is known."""
        ...

    @property
    def eta(self) -> float:
        """0 for the probability-flow ODE; above 0, the share of the reverse SDE's noise."""
        ...

    @property
    def lower_final(self) -> int:
        """Runs of fewer steps than this lower the order of the last steps, for stability."""
        ...

    def predict(self, lam_next: float, nodes: Sequence[float]) -> Row:
        """Row from the newest node nodes[0] to `lam_next`; every node carries an x0 prediction."""
        ...

    def correct(self, lam: float, nodes: Sequence[float], start: float) -> Row:
        """Row that redoes the step from `start` to `lam`, with the prediction made at `lam` as first weight."""
        ...


def exp_moments(h: float, rate: float, n: int) -> FloatArray:
    """M_k = rate * int_0^h exp(-rate * (h - u)) u^k du for k < n.

    By parts, M_k = h^k - (k / rate) * M_{k-1}; for small rate * h that cancels, and the series
    M_k = rate * h^(k+1) k! * sum_j (-rate * h)^j / (k + 1 + j)! is used instead.
    """
    z = rate * h
    if z < 1:
        return np.array([h**k * _small_moment(z, k) for k in range(n)])
    moments = [-math.expm1(-z)]
    for k in range(1, n):
        moments.append(h**k - k / rate * moments[-1])
    return np.array(moments)


def _small_moment(z: float, k: int) -> float:
    term = z / (k + 1)
    total = term
    for j in range(1, 20):
        term *= -z / (k + 1 + j)
        total += term
    return total


@dataclass(frozen=True)
class ExponentialAdams:
    """Exponential Adams method in half log-SNR with data prediction; exact for x0(lambda) of degree < order.

    One rule, many names: order 1 is DDIM (and Euler on VE and flow paths); order 2 with `second="midpoint"` is
    DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2); `corrector` adds UniC, which makes it UniPC (arXiv:2302.04867);
    `eta` = 1 is SDE-DPM-Solver++. The predictor has order `order`, predictor and corrector together order + 1.

    Attributes:
        order: predictions used by a predictor row, 1 to 4.
        corrector: redo each step with the prediction at its end.
        eta: noise of the reverse SDE, >= 0; 0 is the deterministic ODE.
        second: weight of the first difference in two-point rows. `exact` integrates it; `midpoint` is DPM-Solver++'s
            "midpoint" and UniPC's B2(h) = e^h - 1, `bh1` UniPC's B1(h) = h. All three are second order.
        halve_curvature: weight the second difference by half of what third order asks for, as DPM-Solver++(3M) is
            printed and shipped (Diffusers, k-diffusion, the authors' code). That method is of second order.
        lower_final: see `Solver`.
    """

    order: int = 2
    corrector: bool = False
    eta: float = 0.0
    second: SecondOrder = "exact"
    halve_curvature: bool = False
    lower_final: int = 15

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise ValueError(f"order must be 1, 2, 3 or 4, not {self.order!r}")
        if not self.eta >= 0:
            raise ValueError(f"eta must be 0 (the ODE) or more, not {self.eta!r}")
        if self.second not in ("exact", "midpoint", "bh1"):
            raise ValueError(f"unknown second-order rule {self.second!r}; use exact, midpoint or bh1")
        if self.corrector and self.eta:
            raise ValueError("the corrector is for deterministic solvers; use eta=0 or corrector=False")

    @property
    def convergence_order(self) -> int:
        """Declared order of the global error."""
        if self.halve_curvature:
            return min(self.order, 2) + self.corrector
        return self.order + self.corrector

    def predict(self, lam_next: float, nodes: Sequence[float]) -> Row:
        """Row from nodes[0] to `lam_next`; lam_next = inf (sigma = 0) gives the newest prediction itself."""
        if math.isinf(lam_next):
            return Row(0.0, (1.0,))
        h, rate = lam_next - nodes[0], 1.0 + self.eta
        noise = math.exp(-lam_next) * math.sqrt(-math.expm1(-2 * self.eta * h))
        if len(nodes) == 2 and self.second != "exact":
            half = self._area(h, rate) * h / (2 * (nodes[0] - nodes[1]))
            return Row(math.exp(-rate * h), (-math.expm1(-rate * h) + half, -half), noise)
        return Row(math.exp(-rate * h), self._weights(h, rate, [s - nodes[0] for s in nodes]), noise)

    def correct(self, lam: float, nodes: Sequence[float], start: float) -> Row:
        """Row from `start` to `lam` by the polynomial through the predictions at lam, nodes[0], nodes[1]..."""
        h = lam - start
        if len(nodes) == 1 and self.second != "exact":
            half = self._area(h, 1.0) / 2
            return Row(math.exp(-h), (half, -math.expm1(-h) - half))
        return Row(math.exp(-h), self._weights(h, 1.0, [h, *(s - start for s in nodes)]))

    def _area(self, h: float, rate: float) -> float:
        """UniPC's B(h): what two-point rows multiply half of a difference with."""
        return rate * h if self.second == "bh1" else -math.expm1(-rate * h)

    def _weights(self, h: float, rate: float, offsets: Sequence[float]) -> tuple[float, ...]:
        """Moment matching: sum_j m_j * (offset_j / h)^k = M_k / h^k for every k < len(offsets)."""
        n = len(offsets)
        moments = exp_moments(h, rate, n) / h ** np.arange(n)
        if self.halve_curvature and n == 3:
            moments[2] /= 2  # printed: M_0 m0 + M_1 a1 + (M_2 / 2) a2 for the parabola m0 + a1 u + a2 u^2
        vandermonde = np.vander(np.asarray(offsets) / h, increasing=True).T
        return tuple(np.linalg.solve(vandermonde, moments).tolist())


ALWAYS = 10**9  # a `lower_final` that every run is shorter than

SOLVERS: dict[str, ExponentialAdams] = {
    "ddim": ExponentialAdams(order=1),
    "euler": ExponentialAdams(order=1),
    "dpmpp_2m": ExponentialAdams(order=2, second="midpoint"),
    "dpmpp_3m": ExponentialAdams(order=3, second="midpoint"),
    "dpmpp_3m_shipped": ExponentialAdams(order=3, second="midpoint", halve_curvature=True),
    "dpmpp_2m_sde": ExponentialAdams(order=2, second="midpoint", eta=1.0),
    "dpmpp_3m_sde": ExponentialAdams(order=3, second="midpoint", eta=1.0),
    "dpmpp_3m_sde_shipped": ExponentialAdams(order=3, second="midpoint", eta=1.0, halve_curvature=True),
    "unipc_1": ExponentialAdams(order=1, second="midpoint", corrector=True, lower_final=ALWAYS),
    "unipc_1_bh1": ExponentialAdams(order=1, second="bh1", corrector=True, lower_final=ALWAYS),
    "unipc": ExponentialAdams(order=2, second="midpoint", corrector=True, lower_final=ALWAYS),
    "unipc_3": ExponentialAdams(order=3, second="midpoint", corrector=True, lower_final=ALWAYS),
    "unipc_3_bh1": ExponentialAdams(order=3, second="bh1", corrector=True, lower_final=ALWAYS),
}
