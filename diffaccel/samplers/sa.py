"""SA-Solver: the stochastic Adams predictor-corrector with noise in the middle of the run."""

from __future__ import annotations

from dataclasses import dataclass

from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.solver import ALWAYS, Node


@dataclass(frozen=True)
class SASolver(ExponentialAdams):
    """SA-Solver (arXiv:2309.05019, algorithm 1), P3C4 with tau = 1 between 20 % and 80 % of the training time.

    `eta` is the paper's tau^2. The corrector uses the predictor's points and the new one, and keeps the noise drawn.
    Where eta is 0 the step is UniPC's with exact weights.

    Attributes:
        noise_start: share of the training time (1 is pure noise) up to which steps are noisy, as Diffusers' `tau_func`.
        noise_end: share from which they are.
    """

    order: int = 3
    corrector: bool = True
    eta: float = 1.0
    lower_final: int = ALWAYS
    noise_start: float = 0.8
    noise_end: float = 0.2

    def eta_at(self, node: Node) -> float:
        """`eta` inside the interval of training time, 0 outside."""
        log_sigma = node.schedule.times[0] != 0 and node.schedule.path != "flow"
        time = _share(node) if log_sigma else node.time / node.schedule.count
        return self.eta if self.noise_end <= time <= self.noise_start else 0.0


def _share(node: Node) -> float:
    """Training time where the clock is log sigma (EDM, SVD): the share of the table below this noise."""
    times = node.schedule.times
    return float((node.time - times[0]) / (times[-1] - times[0]))
