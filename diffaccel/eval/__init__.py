"""Measurements of what acceleration does to the pictures. Nothing here is imported by `import diffaccel`."""

from diffaccel.eval.fidelity import Interval, clip_distance, latent_mse, paired_interval, psnr
from diffaccel.eval.reference import Reference, ReferenceSettings, converged_reference

__all__ = [
    "Interval",
    "Reference",
    "ReferenceSettings",
    "clip_distance",
    "converged_reference",
    "latent_mse",
    "paired_interval",
    "psnr",
]
