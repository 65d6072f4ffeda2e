"""Noise levels for tests of single rows, and the row carried out on plain numbers."""

from collections.abc import Sequence

import numpy as np

from diffaccel.samplers.row import Row
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule, betas
from diffaccel.samplers.solver import Node

SCHEDULES = {
    "vp": NoiseSchedule.from_alphas_cumprod(np.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000))),
    "ve": NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 1000), "ve"),
    "flow": NoiseSchedule.rectified_flow(1000),
}


def nodes(path: str, lambdas: Sequence[float] | FloatArray) -> list[Node]:
    return [Node(float(v), SCHEDULES[path]) for v in lambdas]


def of_ve_sigma(path: str, sigmas: Sequence[float]) -> list[Node]:
    """Nodes with these sigma / alpha; 0 is the end of a run."""
    with np.errstate(divide="ignore"):
        return nodes(path, -np.log(np.asarray(sigmas, dtype=np.float64)))


def random_nodes(path: str, count: int, seed: int) -> list[Node]:
    """`count` nodes at falling noise from about sigma / alpha = 8 on, unevenly apart."""
    gaps = np.random.default_rng(seed).uniform(0.1, 1.1, count)
    return nodes(path, -2.1 + np.cumsum(gaps))


def apply(
    row: Row, y: float, memory: Sequence[float], x0: float = 0.0, anchor: float = 0.0, noise: float = 0.0
) -> float:
    """What the scheduler makes of a row, for one pixel: `memory` newest first, `x0` the newest x0 prediction."""
    past = sum(w * m for w, m in zip(row.m, memory, strict=False))
    assert len(row.m) <= len(memory)
    return row.x * y + past + row.noise * noise + row.x0 * x0 + row.anchor * anchor
