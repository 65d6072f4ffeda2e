"""Fidelity: how far samples are from those of the same noise without acceleration, and intervals of paired numbers.

Every measure gives one number per sample: whoever averages decides how, and pairs stay pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

RANGE_TOLERANCE = 1e-3  # pictures may leave [0, 1] by this much: rounding, not a forgotten clamp


def latent_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each sample: (N, ...) and (N, ...) -> (N,) float64.

    Latents are taken as they leave the denoising loop, in the scaled units that the network sees (variance about 1).

    Raises:
        ValueError: if the shapes differ or a value is not finite.
    """
    _check_pair(a, b)
    return (a.double() - b.double()).square().flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """-10 log10 of the mean squared error of each picture, in dB: two (N, 3, H, W) in [0, 1] -> (N,) float64.

    Identical pictures give inf; average with a median, or count them apart.

    Raises:
        ValueError: if the shapes differ, or values are not finite or leave [0, 1].
    """
    _check_images(a)
    _check_images(b)
    return -10 * latent_mse(a, b).log10()


@torch.no_grad()
def clip_distance(images_a: Tensor, images_b: Tensor, model: Any, processor: Any) -> Tensor:
    """1 - cosine of the CLIP image features of each pair: two (N, 3, H, W) in [0, 1] -> (N,) float64, 0 to 2.

    A number of this measure means nothing without the backbone: report it as `emoji-clip` where the model of the zoo
    is used, and as the checkpoint's name elsewhere. Two models' distances cannot be compared.

    Args:
        images_a: pictures.
        images_b: the pictures they are compared with.
        model: a `CLIPModel` or `CLIPVisionModelWithProjection` of transformers.
        processor: its `CLIPProcessor` or `CLIPImageProcessor`.

    Raises:
        ValueError: if the shapes differ, or values are not finite or leave [0, 1].
    """
    _check_images(images_a)
    _check_images(images_b)
    _check_pair(images_a, images_b)
    a, b = (_image_features(images, model, processor) for images in (images_a, images_b))
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=1)


def _image_features(images: Tensor, model: Any, processor: Any) -> Tensor:
    # Bytes, as a file would give them: the processor divides by 255, floats would be divided a second time.
    pictures = list((images.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    pixels = getattr(processor, "image_processor", processor)(images=pictures, return_tensors="pt")["pixel_values"]
    pixels = pixels.to(model.device, model.dtype)
    if not hasattr(model, "get_image_features"):
        return model(pixel_values=pixels).image_embeds.double()
    features = model.get_image_features(pixel_values=pixels)
    # transformers 5 wraps the projected features in the vision model's output, 4 returns them bare
    return (features if isinstance(features, Tensor) else features.pooler_output).double()


@dataclass(frozen=True)
class Interval:
    """Median of a paired comparison and its 95 % bootstrap interval.

    Attributes:
        median: median over the pairs, a ratio a / b or a difference a - b.
        low: 2.5th percentile of the median over resamples.
        high: 97.5th percentile.
        pairs: pairs compared.
        clusters: prompts they belong to, which are what is resampled.
    """

    median: float
    low: float
    high: float
    pairs: int
    clusters: int


def paired_interval(
    a: ArrayLike, b: ArrayLike, prompts: Sequence[Any], *, ratio: bool = True, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Median of a / b (or a - b) over pairs, with a 95 % percentile interval by bootstrap over prompts.

    The seeds of one prompt resemble each other more than other prompts' do, so that a prompt is drawn with all its
    pairs (cluster bootstrap); pairs drawn singly would make the interval too narrow. Ratios are taken in logarithm:
    a / b and b / a then tell the same. The interval tells how the median would move with other prompts and seeds,
    not with other weights. It is deterministic.

    Args:
        a: (N,) numbers, one per sample.
        b: (N,) numbers of the same prompts and seeds.
        prompts: (N,) prompt of each pair, anything hashable.
        ratio: compare a / b, of numbers >= 0; otherwise a - b.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: if the lengths differ, there are fewer than 2 prompts, or numbers do not suit.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not a.shape == b.shape == (len(prompts),):
        raise ValueError(
            f"paired numbers and prompts must be lists of one length, not {a.shape}, {b.shape}, {len(prompts)}"
        )
    if np.isnan(a).any() or np.isnan(b).any() or (ratio and ((a < 0).any() or (b < 0).any())):
        raise ValueError("paired numbers must not be NaN, and not negative where their ratio is taken")
    values = _log_ratio(a, b) if ratio else a - b
    table = _by_cluster(values, prompts)
    if len(table) < 2:
        raise ValueError("an interval over prompts needs at least 2 of them")
    rng = np.random.default_rng(seed)
    parts = [
        min(500, resamples - i) for i in range(0, resamples, 500)
    ]  # bounds the memory, whatever the number of pairs
    medians = np.concatenate([_medians(table, rng.integers(len(table), size=(n, len(table)))) for n in parts])
    low, high = np.quantile(medians, [0.025, 0.975], method="closest_observation")  # no inf - inf between neighbours
    numbers = np.array([np.median(values), low, high])
    median, low, high = (np.exp(numbers) if ratio else numbers).tolist()
    return Interval(median, low, high, len(values), len(table))


def _log_ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a == b, 0.0, np.log(a) - np.log(b))  # both 0: equally good


def _by_cluster(values: NDArray[np.float64], clusters: Sequence[Any]) -> NDArray[np.float64]:
    """(clusters, most pairs in one) table of the values, padded with NaN."""
    groups: dict[Any, list[float]] = {}
    for value, cluster in zip(values.tolist(), clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    table = np.full((len(groups), max(map(len, groups.values()), default=0)), np.nan)
    for row, group in zip(table, groups.values(), strict=True):
        row[: len(group)] = group
    return table


def _medians(table: NDArray[np.float64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Median over all numbers of the drawn rows, for each line of `draws`; np.nanmedian is 20 times slower."""
    drawn = np.sort(table[draws].reshape(len(draws), -1), axis=1)  # NaN last
    count = (~np.isnan(table)).sum(1)[draws].sum(1)
    each = np.arange(len(draws))
    with np.errstate(invalid="ignore"):
        low, high = drawn[each, (count - 1) // 2], drawn[each, count // 2]
        return np.where(low == high, low, (low + high) / 2)  # inf stays inf


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"samples are compared in pairs of one shape (N, ...), not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("samples to compare must be finite: a NaN or inf means that the run failed")


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"pictures must be floats (N, 3, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}")
    low, high = float(images.min()), float(images.max())
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"pictures must lie in [0, 1], not in [{low:.4g}, {high:.4g}]; use output_type='pt' or (x + 1) / 2"
        )
