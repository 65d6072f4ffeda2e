"""Exponential integrators in half log-SNR: the family of DDIM, DPM-Solver, DPM-Solver++, UniPC and RES."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffaccel.samplers.row import Row
from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.solver import PURE_NOISE, Node, correction, first_order, point_weights

SecondOrder = Literal["exact", "midpoint", "bh1"]
Prediction = Literal["x0", "epsilon"]


def exp_moments(h: float, rate: float, n: int) -> FloatArray:
    """M_k = rate * int_0^h exp(-rate * (h - u)) u^k du for k < n.

    By parts, M_k = h^k - (k / rate) * M_{k-1}; for small rate * h that cancels, and the series
    M_k = rate * h^(k+1) k! * sum_j (-rate * h)^j / (k + 1 + j)! is used instead.
    """
    z = rate * h
    if abs(z) < 1:
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
    """Exponential Adams method in half log-SNR; exact for predictions that are polynomials of degree < order in it.

    One rule, many names: order 1 is DDIM (and Euler on VE and flow paths); order 2 with `second="midpoint"` is
    DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2), with `exact` RES multistep (arXiv:2308.02157) and, predicting
    noise, DEIS in log rho (arXiv:2204.13902); `corrector` adds UniC, which makes it UniPC (arXiv:2302.04867); `eta` = 1
    is SDE-DPM-Solver++. The predictor has order `order`, predictor and corrector together order + 1.

    Attributes:
        order: predictions used by a predictor row, 1 to 4.
        corrector: redo each step with the prediction at its end. With `eta`, that is SA-Solver (arXiv:2309.05019): the
            redone step keeps the noise it drew.
        eta: noise of the reverse SDE, >= 0; 0 is the deterministic ODE. SA-Solver's tau^2.
        second: weight of the first difference in two-point rows. `exact` integrates it; `midpoint` is DPM-Solver++'s
            "midpoint" and UniPC's B2(h) = e^h - 1, `bh1` UniPC's B1(h) = h. All three are second order.
        halve_curvature: weight the second difference by half of what third order asks for, as DPM-Solver++(3M) is
            shipped (Diffusers, k-diffusion, the authors' code). That method is of second order.
        prediction: what is interpolated: `x0` (DPM-Solver++) or `epsilon` (DPM-Solver, arXiv:2206.00927).
        lower_final: see `Multistep`.
    """

    order: int = 2
    corrector: bool = False
    eta: float = 0.0
    second: SecondOrder = "exact"
    halve_curvature: bool = False
    prediction: Prediction = "x0"
    lower_final: int = 15

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4) or not isinstance(self.order, int):
            raise ValueError(f"order must be 1, 2, 3 or 4, not {self.order!r}")
        if not self.eta >= 0:
            raise ValueError(f"eta must be 0 (the ODE) or more, not {self.eta!r}")
        if self.second not in ("exact", "midpoint", "bh1"):
            raise ValueError(f"unknown second-order rule {self.second!r}; use exact, midpoint or bh1")
        if self.prediction not in ("x0", "epsilon"):
            raise ValueError(f"unknown prediction {self.prediction!r}; use x0 or epsilon")

    @property
    def convergence_order(self) -> int:
        """Declared order of the global error; of its drift, where there is noise."""
        if self.halve_curvature:
            return min(self.order, 2) + self.corrector
        return self.order + self.corrector

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.eta > 0

    @property
    def memory(self) -> Prediction:
        """What is kept of each network call."""
        return self.prediction

    @property
    def can_correct(self) -> bool:
        """Always."""
        return True

    def eta_at(self, node: Node) -> float:
        """Noise of the step that starts at `node`."""
        return self.eta

    def predict(self, end: Node, nodes: Sequence[Node], order: int) -> Row:
        """Row from nodes[0] to `end`; at sigma = 0 that is the newest x0 prediction itself."""
        return self.interval(nodes[0], end, nodes[:order], self.eta_at(nodes[0]))

    def correct(self, node: Node, nodes: Sequence[Node], start: Node, order: int) -> Row:
        """Row to `node` by the polynomial through the predictions at node, nodes[0], nodes[1]..."""
        eta = self.eta_at(start)
        redone = self.weights(start, node, [node, *nodes[:order]], eta)
        if self.prediction == "x0" and not eta:
            return Row(0.0, redone, anchor=math.exp(start.lam - node.lam))
        return correction(redone, self.weights(start, node, nodes[:order], eta))

    def interval(self, start: Node, end: Node, nodes: Sequence[Node], eta: float) -> Row:
        """Row from `start` to `end` by the polynomial through the predictions at `nodes`, newest first."""
        if math.isinf(end.lam):
            return Row(0.0, (1.0,)) if self.prediction == "x0" else Row(0.0, (), x0=1.0)
        h = end.lam - start.lam
        if self.prediction == "x0":
            noise = end.ve_sigma * math.sqrt(-math.expm1(-2 * eta * h))
            return Row(math.exp(-(1 + eta) * h), self.weights(start, end, nodes, eta), noise)
        if eta and start.ve_sigma > PURE_NOISE:  # eps frozen over such a step keeps its noise: freeze x0 instead
            kept = math.exp(-(1 + eta) * h)
            return Row(kept, (), end.ve_sigma * math.sqrt(-math.expm1(-2 * eta * h)), x0=1 - kept)
        noise = end.ve_sigma * math.sqrt(eta * math.expm1(2 * h))
        row = first_order(start.ve_sigma, end.ve_sigma, 1 + eta)
        # Beyond first order only differences of predictions count; the start of the step carries the first of them.
        weights = list(self.weights(start, end, nodes, eta))
        weights[[n.lam for n in nodes].index(start.lam)] -= (1 + eta) * (end.ve_sigma - start.ve_sigma)
        return Row(row.x, tuple(weights), noise, row.x0)

    def weights(self, start: Node, end: Node, nodes: Sequence[Node], eta: float) -> tuple[float, ...]:
        """Weights of the predictions at `nodes`: sum_j w_j * offset_j^k = moment_k for every k < len(nodes)."""
        h, offsets = end.lam - start.lam, [n.lam - start.lam for n in nodes]
        if self.prediction == "x0":
            unit, rate = 1.0, 1.0 + eta
        else:  # -(1 + eta) * int exp(-lambda) u^k du, as moments of rate -1
            unit, rate = (1 + eta) * end.ve_sigma, -1.0
        if len(nodes) == 2 and self.second != "exact":
            area = rate * h if self.second == "bh1" else -math.expm1(-rate * h)  # UniPC's B(h)
            moments = np.array([-math.expm1(-rate * h), area * h / 2])
        else:
            moments = exp_moments(h, rate, len(nodes))
        if self.halve_curvature and len(nodes) == 3:
            moments[2] /= 2  # as shipped: M_0 m0 + M_1 a1 + (M_2 / 2) a2 for the parabola m0 + a1 u + a2 u^2
        return tuple(unit * w for w in point_weights(moments, offsets))
