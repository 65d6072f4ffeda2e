"""Row: one solver step as a linear combination, and the little tensor arithmetic that carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


@dataclass(frozen=True)
class Row:
    """x_next = x * sample + anchor * held sample + x0 * x0_prediction + sum_j m[j] * memory[j] + noise * z.

    Plain floats; the memory's newest entry comes first. `anchor` weighs the sample at the start of a step that is
    redone or has several stages, and `x0` the newest x0 prediction where the memory holds something else.
    """

    x: float
    m: tuple[float, ...]
    noise: float = 0.0
    x0: float = 0.0
    anchor: float = 0.0


def rescale(row: Row, frame_from: float, frame_to: float, frame_anchor: float = 1.0) -> Row:
    """Take a row from x / frame, where solvers are written, to the network's own x."""
    return Row(
        row.x * frame_to / frame_from,
        tuple(frame_to * c for c in row.m),
        frame_to * row.noise,
        frame_to * row.x0,
        row.anchor * frame_to / frame_anchor,
    )


def x0_coefficients(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) with x0 = p * sample + q * model_output, for a network that predicts `prediction_type`."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return 0.0, 1.0
    if prediction_type == "v_prediction":  # v = alpha * eps - sigma * x0 (arXiv:2202.00512)
        return alpha, -sigma
    if prediction_type == "flow_prediction":  # eps - x0
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    raise ValueError(f"unknown prediction_type {prediction_type!r}; use {', '.join(PREDICTION_TYPES)}")


def memory_coefficients(memory: str, alpha: float, sigma: float, path: str) -> tuple[float, float]:
    """(p, q) with memory = p * sample + q * x0: x0 itself, eps, or the slope (eps, on flow paths eps - x0)."""
    if memory == "x0":
        return 0.0, 1.0
    if memory == "slope" and path == "flow":
        return 1 / sigma, -(alpha + sigma) / sigma
    return 1 / sigma, -alpha / sigma


def edm_coefficients(prediction_type: str, sigma: float, sigma_data: float) -> tuple[float, float]:
    """(c_skip, c_out) of EDM preconditioning (arXiv:2206.00364, table 1); `v_prediction` flips the sign of c_out."""
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {prediction_type!r} has no EDM form; use epsilon or v_prediction")
    variance = sigma**2 + sigma_data**2
    sign = 1.0 if prediction_type == "epsilon" else -1.0
    return sigma_data**2 / variance, sign * sigma * sigma_data / variance**0.5


def combine(weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """sum_j weights[j] * tensors[j]; weights are 0-d tensors on the tensors' device, so that no step syncs."""
    out = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        out = torch.addcmul(out, tensor, weight)
    return out


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clamp each sample of x0 (N, ...) to its `ratio` quantile of |x0|, at least 1 and at most `max_value`, and divide.

    Imagen's dynamic thresholding (arXiv:2205.11487, section 2.3), for pixel models.
    """
    limit = torch.quantile(x0.flatten(1).abs(), ratio, dim=1)
    limit = limit.clamp(min=1, max=max_value).view(-1, *[1] * (x0.ndim - 1))
    return torch.clamp(x0, -limit, limit) / limit
