"""Maximum mean discrepancies: KID and CMMD. All sums are float64 and go block by block: no (N, N) matrix is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.jackknife import Replicates
from diffaccel.eval.statistics.moments import Array, as_features

BLOCK = 512  # rows of a kernel matrix held at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
Kernel = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class KID:
    """KID over random subsets.

    Attributes:
        value: mean over the subsets.
        std: standard deviation over the subsets (divisor: their number), which published tables print behind the
            mean. It is no standard error: subsets overlap, and it shrinks with their size, not with N.
        subsets: their number.
        subset_size: samples of each side in a subset.
        seed: of the draws.
    """

    value: float
    std: float
    subsets: int
    subset_size: int
    seed: int


def kid(x: ArrayLike, y: ArrayLike, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KID:
    """Kernel Inception distance as published (Binkowski et al. 2018): unbiased MMD^2 over random subsets.

    The kernel is (x.y / d + 1)^3. Its estimate without bias may be negative. Departures: the draws have their own
    generator (for each subset, `numpy.random.default_rng(seed)` draws rows of x, then of y, without replacement), so
    that numbers repeat; and too few samples are an error, where clean-fid quietly shrinks the subsets.

    Args:
        x: features (N, d).
        y: features (M, d).
        subsets: number of subsets.
        subset_size: samples of each side in a subset.
        seed: of the draws.

    Raises:
        DataError: if a side has fewer samples than `subset_size`, dimensions differ, or values are not finite.
        ValueError: if `subsets` is below 1 or `subset_size` below 2.
    """
    x, y = _pair(x, y)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"KID needs subsets >= 1 and subset_size >= 2, not {subsets} and {subset_size}")
    if subset_size > min(len(x), len(y)):
        raise DataError(
            f"KID with subsets of {subset_size} needs as many pictures on each side, not {len(x)} and {len(y)}; "
            "generate more, or use kid_full (all pairs), which any number suits"
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        rows, columns = (rng.choice(len(side), subset_size, replace=False) for side in (x, y))
        values.append(_Sums.of(_cubic, [x[rows]], y[columns]).unbiased())
    return KID(float(np.mean(values)), float(np.std(values)), subsets, subset_size, seed)


def kid_full(x: ArrayLike, y: ArrayLike) -> float:
    """KID of all pairs: MMD^2 with the kernel (x.y / d + 1)^3, without bias and without random draws.

    It estimates the same number as `kid`, from all samples, so that it repeats and scatters least.

    Raises:
        DataError: if a side has fewer than 2 samples, dimensions differ, or values are not finite.
    """
    x, y = _pair(x, y)
    return _Sums.of(_cubic, [x], y).unbiased()


def kid_full_replicates(groups: Sequence[ArrayLike], y: ArrayLike) -> Replicates:
    """`kid_full` of all groups of x and without each of them: the jackknife's numbers for little more than one KID.

    Raises:
        DataError: if there are fewer than 2 groups, or they do not suit as in `kid_full`.
    """
    return _replicates(_cubic, [as_features(group) for group in groups], as_features(y, "the reference"))


def cmmd(x: ArrayLike, y: ArrayLike) -> float:
    """CMMD as published (Jayasumana et al. 2024): 1000 x MMD^2, Gaussian kernel of sigma 10, biased (V-statistic).

    Meant for image features of CLIP ViT-L/14 at 336 pixels; other networks' numbers are not comparable. Vectors are
    scaled to length 1, as in the reference implementation. The bias is about 8 / N: two sets of one distribution
    read 0.008 at N = 1000. On the unit sphere so wide a kernel is nearly linear, and the result within a percent
    10 |mean_x - mean_y|^2: CMMD sees shifts of the mean and hardly anything else.

    Raises:
        DataError: if a side has fewer than 2 samples, dimensions differ, values are not finite, or a vector is 0.
    """
    x, y = (_directions(side) for side in _pair(x, y))
    return CMMD_SCALE * _Sums.of(_gaussian, [x], y).biased()


def cmmd_unbiased(x: ArrayLike, y: ArrayLike) -> float:
    """CMMD without its bias (U-statistic), which may be negative; elsewhere as `cmmd`."""
    x, y = (_directions(side) for side in _pair(x, y))
    return CMMD_SCALE * _Sums.of(_gaussian, [x], y).unbiased()


def cmmd_unbiased_replicates(groups: Sequence[ArrayLike], y: ArrayLike) -> Replicates:
    """`cmmd_unbiased` of all groups of x and without each of them, for little more than one CMMD.

    Raises:
        DataError: if there are fewer than 2 groups, or they do not suit as in `cmmd`.
    """
    directions = [_directions(as_features(group)) for group in groups]
    return _replicates(_gaussian, directions, _directions(as_features(y, "the reference")), CMMD_SCALE)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums of a kernel over pairs, none of a sample with itself: of x by group, of x and y, of y."""

    sizes: Array
    within: Array
    across: Array
    m: int
    within_y: float

    @classmethod
    def of(cls, kernel: Kernel, groups: Sequence[Array], y: Array) -> _Sums:
        count = len(groups)
        within = np.zeros((count, count))
        for i, group in enumerate(groups):
            within[i, i] = _sum_others(kernel, group)
            for j in range(i):
                within[i, j] = within[j, i] = _sum(kernel, group, groups[j])
        across = np.array([_sum(kernel, group, y) for group in groups])
        return cls(np.array([len(g) for g in groups]), within, across, len(y), _sum_others(kernel, y))

    def without(self, i: int) -> _Sums:
        keep = np.arange(len(self.sizes)) != i
        within = self.within[np.ix_(keep, keep)]
        return _Sums(self.sizes[keep], within, self.across[keep], self.m, self.within_y)

    def unbiased(self) -> float:
        n, m = int(self.sizes.sum()), self.m
        own = self.within.sum() / (n * (n - 1)) + self.within_y / (m * (m - 1))
        return float(own - 2 * self.across.sum() / (n * m))

    def biased(self) -> float:
        n, m = int(self.sizes.sum()), self.m
        own = self.within.sum() / n**2 + self.within_y / m**2  # `_gaussian` of a sample with itself is 0
        return float(own - 2 * self.across.sum() / (n * m))


def _replicates(kernel: Kernel, groups: Sequence[Array], y: Array, scale: float = 1.0) -> Replicates:
    sizes = tuple(len(group) for group in groups)
    if len(sizes) < 2:
        raise DataError(f"a jackknife needs at least 2 groups, not {len(sizes)}")
    for group in groups:
        _check_dims(group, y)
    if min(sum(sizes) - max(sizes), len(y)) < 2:
        raise DataError("an MMD needs at least 2 pictures on each side, also without a group")
    sums = _Sums.of(kernel, groups, y)
    left_out = tuple(scale * sums.without(i).unbiased() for i in range(len(sizes)))
    return Replicates(scale * sums.unbiased(), left_out, sizes)


def _sum(kernel: Kernel, x: Array, y: Array) -> float:
    return sum(float(kernel(x[i : i + BLOCK], y).sum()) for i in range(0, len(x), BLOCK))


def _sum_others(kernel: Kernel, x: Array) -> float:
    """Sum over pairs of different samples, in both orders."""
    total = 0.0
    for i in range(0, len(x), BLOCK):
        rows, later = x[i : i + BLOCK], x[i + BLOCK :]
        block = kernel(rows, rows)
        total += float(block.sum() - np.trace(block)) + 2 * float(kernel(rows, later).sum())
    return total


def _cubic(x: Array, y: Array) -> Array:
    values = x @ y.T
    values /= x.shape[1]
    values += 1
    cubes = values * values  # ** 3 is 20 times slower
    cubes *= values
    return cubes


def _gaussian(x: Array, y: Array) -> Array:
    """exp(-|x - y|^2 / (2 sigma^2)) - 1 of unit vectors: the 1 cancels in every MMD, and would cost it digits."""
    values = x @ y.T
    values -= 1
    values /= CMMD_SIGMA**2
    return np.expm1(values, out=values)


def _directions(features: Array) -> Array:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise DataError(f"row {int(np.flatnonzero(lengths == 0)[0])} of the features is 0, so that it has no direction")
    return features / lengths


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    a, b = as_features(x), as_features(y)
    _check_dims(a, b)
    if min(len(a), len(b)) < 2:
        raise DataError(f"an MMD needs at least 2 pictures on each side, not {len(a)} and {len(b)}")
    return a, b


def _check_dims(x: Array, y: Array) -> None:
    if x.shape[1] != y.shape[1]:
        raise DataError(f"the two sides have {x.shape[1]} and {y.shape[1]} features: use one extractor for both")
