"""Structural similarity of pictures in pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.eval.errors import DataError
from diffaccel.eval.images import to_floats

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # for values in [0, 1]


@torch.inference_mode()
def ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each pair: two (N, 3, H, W), uint8 or floats in [0, 1] -> (N,) float64, 1 for equal pictures.

    Wang et al. 2004 (IEEE TIP 13:4), eq. 13: Gaussian window of 11 x 11 pixels, sigma 1.5, averaged over the places
    where it lies inside the picture. They take the luminance, here it is the mean over red, green and blue, as in
    most programs of today. The programs do not agree: torchmetrics 1.9 also counts windows that reach over the border
    into mirrored pixels, and scikit-image's default is a 7 x 7 box.

    Raises:
        DataError: if the pictures differ in shape, are smaller than 11 pixels, not finite or not in [0, 1].
    """
    a, b = to_floats(a).double(), to_floats(b).double()
    if a.shape != b.shape or a.ndim != 4:
        raise DataError(f"SSIM compares two (N, 3, H, W) of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    if min(a.shape[2:]) < WINDOW:
        raise DataError(f"SSIM needs pictures of at least {WINDOW} x {WINDOW} pixels, not {tuple(a.shape[2:])}")
    return torch.stack([_ssim(x[:, None], y[:, None]) for x, y in zip(a, b, strict=True)])


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """One pair, (3, 1, H, W) each: the channels are the batch."""
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    var_a, var_b = _window_mean(a * a) - mean_a**2, _window_mean(b * b) - mean_b**2
    covariance = _window_mean(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return (likeness / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))).mean()


def _window_mean(x: Tensor) -> Tensor:
    place = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-(place**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
