"""Precision, recall, density and coverage: where samples lie among the nearest neighbours of others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.moments import Array, as_features

BLOCK = 512  # rows of a distance matrix held at a time
TIE = 1e-10  # squared distances this close to each other are equal: rounding must not decide between < and <=


@dataclass(frozen=True)
class Neighbours:
    """Four shares and the convention they were made with; numbers of other conventions are not comparable.

    Attributes:
        precision: share of generated samples within a reference sample's ball: are they realistic?
        recall: share of reference samples within a generated sample's ball: are they all reached?
        density: reference balls around a generated sample, over k; above 1 where samples crowd. Outliers of the
            reference count less than in precision.
        coverage: share of reference samples whose ball holds a generated sample.
        convention: k, comparisons and numbers of samples, in words.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    convention: str


def neighbours(generated: ArrayLike, reference: ArrayLike, precision_k: int = 3, density_k: int = 5) -> Neighbours:
    """Precision, recall, density and coverage of generated features (N, d) against reference features (M, d).

    A sample's ball reaches to its k-th nearest neighbour in its own set (not itself). Precision and recall are those
    of Kynkaanniemi et al. 2019, k = 3 and a closed ball (<=), as ADM and torch-fidelity have them; density and coverage
    those of Naeem et al. 2020, k = 5 and an open ball (<), as the `prdc` package has them. Distances are Euclidean in
    float64; published numbers are of 10,000 or 50,000 samples a side, and all four change with their numbers.

    Args:
        generated: features of the generated pictures.
        reference: features of the reference pictures.
        precision_k: k of precision and recall.
        density_k: k of density and coverage.

    Raises:
        DataError: if a side has not more samples than k, dimensions differ, or values are not finite.
        ValueError: if a k is below 1.
    """
    x, y = as_features(generated, "generated features"), as_features(reference, "reference features")
    if min(precision_k, density_k) < 1:
        raise ValueError(f"k counts neighbours and must be at least 1, not {precision_k} and {density_k}")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"the two sides have {x.shape[1]} and {y.shape[1]} features: use one extractor for both")
    if min(len(x), len(y)) <= max(precision_k, density_k):
        raise DataError(
            f"k = {max(precision_k, density_k)} neighbours need more samples than that on each side, not {len(x)} "
            f"and {len(y)}"
        )
    mean = y.mean(0)
    x, y = x - mean, y - mean  # the squared lengths in `_distances` would take the digits of features far from 0
    (radius_x,) = _radii(x, (precision_k,))
    radius_y, open_radius = _radii(y, (precision_k, density_k))
    precise = np.zeros(len(x), dtype=bool)
    recalled, covered, balls = 0, 0, 0
    for i in range(0, len(y), BLOCK):
        distances = _distances(y[i : i + BLOCK], x)
        precise |= (distances <= radius_y[i : i + BLOCK, None] * (1 + TIE)).any(0)
        recalled += int((distances <= radius_x * (1 + TIE)).any(1).sum())
        inside = distances < open_radius[i : i + BLOCK, None] * (1 - TIE)
        balls += int(inside.sum())
        covered += int(inside.any(1).sum())
    convention = (
        f"precision and recall: k = {precision_k}, <=; density and coverage: k = {density_k}, <; "
        f"{len(x)} generated, {len(y)} reference"
    )
    density = balls / (density_k * len(x))
    return Neighbours(float(precise.mean()), recalled / len(y), density, covered / len(y), convention)


def _radii(x: Array, ks: tuple[int, ...]) -> list[Array]:
    """Squared distance of each sample to its k-th nearest neighbour, for every k."""
    radii = [np.empty(len(x)) for _ in ks]
    for i in range(0, len(x), BLOCK):
        distances = _distances(x[i : i + BLOCK], x)
        rows = np.arange(len(distances))
        distances[rows, i + rows] = -1.0  # itself comes first, whatever duplicates it has
        distances.partition(sorted(set(ks)), axis=1)
        for radius, k in zip(radii, ks, strict=True):
            radius[i : i + BLOCK] = distances[:, k]
    return radii


def _distances(x: Array, y: Array) -> Array:
    """(N, M) squared distances; what is below rounding is 0, so that equal samples are."""
    lengths = np.einsum("id,id->i", x, x)[:, None] + np.einsum("id,id->i", y, y)
    distances = x @ y.T
    distances *= -2
    distances += lengths
    distances[distances < 16 * np.finfo(np.float64).eps * lengths] = 0.0
    return distances
