"""Measures of one picture against its twin of the same prompt and seed, or against its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaccel.eval import fidelity
from diffaccel.eval.errors import DataError
from diffaccel.eval.images import read_picture, to_floats
from diffaccel.eval.reports.table import Better, Column
from diffaccel.eval.runs.run import Run, check_pairs, jackknife_groups
from diffaccel.eval.runs.shards import shard_ranges
from diffaccel.eval.statistics.jackknife import GROUPS, Estimate, replicates

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PairedMeasure:
    """A measure with one number for each picture.

    Attributes:
        column: its column.
        average: what the table shows: the mean, or the median where a few pictures would decide the mean (PSNR is
            infinite for identical pictures, latent errors span decades).
    """

    column: Column
    average: Literal["mean", "median"]


def _measure(key: str, title: str, unit: str, better: Better, digits: int, average: Literal["mean", "median"]):
    return PairedMeasure(Column(key, title, unit, better, digits), average)


PAIRED_MEASURES = {
    "psnr": _measure("psnr", "PSNR", "dB", "higher", 2, "median"),
    "ssim": _measure("ssim", "SSIM", "", "higher", 3, "mean"),
    "lpips": _measure("lpips", "LPIPS", "", "lower", 4, "mean"),
    "latent_mse": _measure("latent_mse", "latent MSE", "", "lower", 4, "median"),
}


def compare_pictures(
    run: Run, baseline: Run, measure: Callable[[Tensor, Tensor], Tensor], *, batch: int = 32
) -> Array | str:
    """`measure` of every pair of pictures: two (N, 3, H, W) in [0, 1] -> (N,); pairs are matched by prompt and seed.

    A string says why there are no numbers: pictures of several sizes, or pictures that the measure is not made for.

    Raises:
        ProtocolMismatch: if the runs differ in prompts or seeds.
        DataError: if a picture is damaged.
    """
    check_pairs(run, baseline)
    values = []
    for indices in shard_ranges(len(run.paths), batch):
        pairs = [[read_picture(paths[i]) for i in indices] for paths in (run.paths, baseline.paths)]
        sizes = sorted({tuple(picture.shape[1:]) for side in pairs for picture in side})
        if len(sizes) > 1:
            found = ", ".join(f"{width} x {height}" for height, width in sizes)
            return f"its pictures and the baseline's are of several sizes ({found}); paired measures need one"
        a, b = (to_floats(torch.stack(side)) for side in pairs)
        try:
            values.append(measure(a, b).double().cpu())
        except DataError as error:
            return str(error)
    return torch.cat(values).numpy()


def compare_latents(run: Run, baseline: Run) -> Array | str:
    """Latent MSE of every pair, or why there is none."""
    check_pairs(run, baseline)
    a, b = run.latents(), baseline.latents()
    if a is None or b is None:
        return "no latents were kept; generate with latents (--latents)"
    if a.shape != b.shape:
        return f"its latents and the baseline's differ in shape, {tuple(a.shape[1:])} and {tuple(b.shape[1:])}"
    return fidelity.latent_mse(a, b).numpy()


def average(values: Array, ids: Sequence[str], kind: Literal["mean", "median"]) -> Estimate:
    """Mean with the jackknife's standard error, or median with the bootstrap's; prompts are what is left out or drawn.

    The error is None where there are fewer than 2 prompts, or where the median's interval reaches to infinity.
    """
    groups = jackknife_groups(ids, GROUPS)
    if kind == "mean":
        if len(groups) < 2:
            return Estimate(float(values.mean()), n=len(values))
        found = replicates(lambda x: float(np.mean(x)), [values[group] for group in groups]).estimate()
        return Estimate(found.value, found.se, len(values))
    if len(groups) < 2:
        return Estimate(float(np.median(values)), n=len(values))
    interval = fidelity.paired_interval(values, np.zeros_like(values), ids, ratio=False)
    error = (interval.high - interval.low) / (2 * 1.96)
    return Estimate(interval.median, error if np.isfinite(error) else None, len(values))
