"""What the plan of a run asks of a solver, and the noise levels it is told. No tensors, pipelines, devices or configs.

A solver keeps one quantity a network call in its history, its `memory`, and returns rows (see `row.py`) in a frame in
which its rule needs no path:

- `x0`: predictions of x0, in y = x / alpha = x0 + exp(-lambda) * eps. There the VP, VE and rectified-flow paths are
  one and the same curve, and half log-SNR is the only clock.
- `epsilon`: predictions of eps, in the same y.
- `slope`: dx/dsigma of k-diffusion and of flow models, in Diffusers' `sigmas`: eps against sigma / alpha in y on VP and
  VE paths, the velocity eps - x0 against sigma in x itself on flow paths.

The path enters once, when a row is rescaled from the frame to x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from diffaccel.samplers.row import Row
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule

Memory = Literal["x0", "epsilon", "slope"]
PURE_NOISE = 1000.0  # sigma / alpha above which next to nothing of x0 is in the sample: flow and zero-SNR starts
ALWAYS = 10**9  # a `lower_final` that every run is shorter than


@dataclass(frozen=True)
class Node:
    """A noise level on a path, by its half log-SNR `lam`; inf is sigma = 0."""

    lam: float
    schedule: NoiseSchedule

    @property
    def ve_sigma(self) -> float:
        """Return sigma / alpha on every path."""
        return math.exp(-self.lam)

    @property
    def alpha_bar(self) -> float:
        """alpha^2 / (alpha^2 + sigma^2) on every path."""
        return 1 / (1 + self.ve_sigma**2)

    @property
    def sigma(self) -> float:
        """What Diffusers calls sigma: sigma / alpha on VP and VE paths, sigma on flow paths."""
        return float(self.schedule.sigma_at(self.lam))

    @property
    def time(self) -> float:
        """What the network is told; at sigma = 0 the time of the least trained noise."""
        return float(self.schedule.time_at(self.lam))

    @cached_property
    def alpha(self) -> float:
        """Share of x0 in x."""
        return self.schedule.alpha_sigma(self.lam)[0]

    def frame(self, memory: Memory) -> float:
        """Number that x is divided by in the frame of `memory`."""
        return 1.0 if memory == "slope" and self.schedule.path == "flow" else self.alpha

    def frame_sigma(self, memory: Memory) -> float:
        """Amount of noise in the frame of `memory`: x / frame = x0 + frame_sigma * (eps, or eps - x0 for velocity)."""
        return self.sigma if memory == "slope" else self.ve_sigma


class Solver(Protocol):
    """What both kinds of solver have in common. Implementations are frozen dataclasses."""

    @property
    def order(self) -> int:
        """Most predictions that a row uses."""
        ...

    @property
    def convergence_order(self) -> int:
        """Declared order of the global error, checked by `tests/samplers/test_order.py`."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        ...

    @property
    def memory(self) -> Memory:
        """What is kept of each network call."""
        ...


class Multistep(Solver, Protocol):
    """Solver of one network call a step, which looks back at earlier ones."""

    @property
    def corrector(self) -> bool:
        """Whether every step is redone once the prediction at its end is known."""
        ...

    @property
    def can_correct(self) -> bool:
        """Whether `correct` has a rule; starts and ends that redo one step need it."""
        ...

    @property
    def lower_final(self) -> int:
        """Runs of fewer steps than this lower the order of the last steps, for stability."""
        ...

    def predict(self, end: Node, nodes: Sequence[Node], order: int) -> Row:
        """Row from nodes[0], the newest, to `end`; each of the `nodes` carries a prediction, `order` <= len(nodes)."""
        ...

    def correct(self, node: Node, nodes: Sequence[Node], start: Node, order: int) -> Row:
        """Row that redoes the step from `start` to `node`, with the prediction made at `node` as first weight.

        `nodes` are those before it, newest first, of which the step used `order`. The row may use the sample as the
        step left it (`Row.x`), which holds the noise of that step, or the one it began with (`Row.anchor`).
        """
        ...


class Singlestep(Solver, Protocol):
    """Solver whose step has several network calls (stages) and no memory of earlier steps."""

    @property
    def stages(self) -> int:
        """Network calls of a full step."""
        ...

    def max_stages(self, start: Node, end: Node) -> int:
        """Stages that the interval can have: 1 where the run ends at sigma = 0, or where more would be unsafe."""
        ...

    def inner(self, nodes: Sequence[Node], i: int, stages: int) -> list[Node]:
        """Where the calls after the first are made in the step from nodes[i]."""
        ...

    def rows(self, nodes: Sequence[Node], i: int, stages: int) -> list[Row]:
        """Row of each stage: to the next call, and the last to nodes[i + 1].

        `Row.anchor` weighs the sample at the start of the step, `Row.x` the current one; the first row uses `Row.x`.
        """
        ...


def first_order(start: float, end: float, share: float = 1.0) -> Row:
    """DDIM from noise `start` to `end` in any frame, with `share` of its eps or slope; written with x0.

    y + share * (end - start) * (y - x0) / start. In eps or slope it would be the difference of two large numbers where
    there is next to no signal, as at the start of a flow or zero-terminal-SNR model.
    """
    kept = share * (1 - end / start)
    return Row(1 - kept, (), x0=kept)


def correction(redone: Sequence[float], made: Sequence[float]) -> Row:
    """What a step still lacks: the weights with the prediction at its end, less those it was made with."""
    return Row(1.0, (redone[0], *(new - old for new, old in zip(redone[1:], made, strict=True))))


def differences(moments: FloatArray, offsets: Sequence[float]) -> tuple[float, ...]:
    """Weights w with sum_j w_j offset_j^k = moments[k] for 1 <= k < n and sum_j w_j = 0; offsets[0] is 0.

    The part of an n-point linear multistep rule that goes beyond first order: moments[k] is the integral of the rule's
    kernel times v^k, where v is the variable that the predictions are polynomials of.
    """
    w = point_weights(moments, offsets)
    return (w[0] - float(moments[0]), *w[1:])


def point_weights(moments: FloatArray, offsets: Sequence[float]) -> tuple[float, ...]:
    """Weights w with sum_j w_j offset_j^k = moments[k] for every k < n = len(offsets) = len(moments)."""
    if len(offsets) == 1:
        return (float(moments[0]),)
    if len(offsets) == 2:
        second = float(moments[1] - offsets[0] * moments[0]) / (offsets[1] - offsets[0])
        return float(moments[0]) - second, second
    scale = max(abs(v) for v in offsets) or 1.0
    vandermonde = np.vander(np.asarray(offsets) / scale, increasing=True).T
    return tuple(np.linalg.solve(vandermonde, moments / scale ** np.arange(len(offsets))).tolist())
