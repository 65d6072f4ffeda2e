"""How much the network's error in one call moves the end of a trajectory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffaccel.samplers.row import x0_coefficients
from diffaccel.samplers.scheduler import SolverScheduler


def influence(scheduler: Any, timesteps: Any) -> NDArray[np.float64]:
    """(n,) squared effect of an error in each call on the last latent, mean 1.

    The scale of the predictions differs from call to call: the same error in the noise moves the result by
    sigma' / alpha' - sigma / alpha of its step, which is a hundred times more at much noise than at little. Taken is
    DDIM (Euler in sigma / alpha) on these timesteps, whatever the solver, with every other prediction held: x' = a x +
    b m for model output m, so that an error in call i is multiplied by b_i a_{i+1} ... a_{n-1}. For epsilon, v, x0 and
    flow prediction. Without it, criteria that compare errors of single calls took `emoji-sd`'s middle out, which few
    pictures survive (docs/pruning.md).

    Args:
        scheduler: of the pipeline; its config says path and prediction type.
        timesteps: (n,) what the network is told, falling.

    Returns:
        Weights; all 1 for a scheduler whose trajectories are of another kind (LCM, preconditioned EDM), or a single
        call.
    """
    times = np.asarray(timesteps, dtype=np.float64)
    try:
        known = SolverScheduler.from_config(scheduler.config)
    except (TypeError, ValueError, KeyError):
        return np.ones(len(times))
    if known.schedule.path == "ve" or len(times) < 2 or not (np.diff(times) < 0).all():
        return np.ones(len(times))
    levels = [known.schedule.alpha_sigma(lam) for lam in (*known.schedule.lambda_at(times), np.inf)]
    effect = np.zeros(len(times))
    behind = 1.0  # what the later steps make of a change of x
    for i in reversed(range(len(times))):
        (alpha, sigma), (next_alpha, next_sigma) = levels[i], levels[i + 1]
        p, q = x0_coefficients(known.prediction_type, alpha, sigma)
        gain = next_alpha - alpha * next_sigma / sigma
        effect[i] = (behind * gain * q) ** 2
        behind *= next_sigma / sigma + gain * p
    total = effect.mean()
    return effect / total if np.isfinite(total) and total > 0 else np.ones(len(times))
