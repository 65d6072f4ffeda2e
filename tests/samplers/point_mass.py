"""Networks that know the one picture there is, for every kind of network; any sampler must then return it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffaccel import SolverScheduler
from tests.tiny import SD_BETAS, noise

COSINE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR: dict[str, Any] = {**SD_BETAS, "rescale_betas_zero_snr": True}
NETWORKS: dict[str, Mapping[str, Any]] = {
    name: SolverScheduler(**keys).config
    for name, keys in {
        "epsilon": SD_BETAS,
        "sample": {**SD_BETAS, "prediction_type": "sample"},
        "v": {**SD_BETAS, "prediction_type": "v_prediction"},
        "zero_snr_v": {**ZERO_SNR, "prediction_type": "v_prediction"},
        "zero_snr_sample": {**ZERO_SNR, "prediction_type": "sample"},
        "cosine": COSINE,
        "edm": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
        "svd": {
            "prediction_type": "v_prediction",
            "timestep_type": "continuous",
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
        "flow": {"prediction_type": "flow_prediction", "shift": 3.0},
    }.items()
}
X0, EPS = noise(1, 2, 2, 2, seed=1).double(), noise(1, 2, 2, 2, seed=2).double()


def level(scheduler: SolverScheduler, i: int) -> tuple[float, float]:
    """(alpha, sigma) of node `i`."""
    return scheduler.schedule.alpha_sigma(scheduler.grid.lambdas[i])


def at_level(scheduler: SolverScheduler, i: int, x0: Tensor = X0, eps: Tensor = EPS) -> Tensor:
    """The picture with the noise of node `i`."""
    alpha, sigma = level(scheduler, i)
    return alpha * x0 + sigma * eps


def output(scheduler: SolverScheduler, i: int, x: Tensor, x0: Tensor = X0) -> Tensor:
    """What the network says of `x` at node `i`, in float64."""
    alpha, sigma = level(scheduler, i)
    x = x.double()
    if scheduler.schedule.path == "ve":  # EDM preconditioning (arXiv:2206.00364, table 1)
        data, variance = scheduler.config["sigma_data"], scheduler.config["sigma_data"] ** 2 + sigma**2
        return (x0 - data**2 / variance * x) / (sigma * data / variance**0.5)
    eps = (x - alpha * x0) / sigma
    said = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0}
    return said[scheduler.prediction_type].expand_as(x)


def samples(
    scheduler: SolverScheduler, x: Tensor | None = None, generator: Any = None, begin: int = 0, x0: Tensor = X0
) -> list[Tensor]:
    """The sample before each call from node `begin` on, and at the end; from the picture with noise if no `x`."""
    out = [at_level(scheduler, begin).float() if x is None else x]
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        scheduler.scale_model_input(out[-1], t)
        said = output(scheduler, i, out[-1], x0).to(out[-1].dtype)
        out.append(scheduler.step(said, t, out[-1], generator, return_dict=False)[0])
    return out
