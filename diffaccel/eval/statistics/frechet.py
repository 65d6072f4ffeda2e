"""The Frechet distance of Gaussians, which is FID on Inception features: without a matrix square root."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.moments import Array, Moments, as_features

EPS = float(np.finfo(np.float64).eps)
# Smallest pivot (of the largest variance) with which Cholesky is trusted. That of a singular matrix is 0 but for
# rounding, which elimination blows up to 1e-13 and more, and whose square root would count.
WELL_CONDITIONED = 1e-8
NOT_A_COVARIANCE = 1e-5  # an eigenvalue this far (of the largest) from what it must be is more than rounding of float32


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A Gaussian with a factor of its covariance: the costly part of a reference, done once.

    Attributes:
        n: number of vectors it was fitted to.
        mean: (d,).
        factor: (d, r), factor @ factor.T is the covariance; r is its rank, or more.
        trace: of the covariance.
    """

    n: int
    mean: Array
    factor: Array
    trace: float


def gaussian(x: ArrayLike | Moments | Gaussian) -> Gaussian:
    """The Gaussian of features (N, d) or of moments; what is one already stays.

    Features with N <= d are their own factor, which is exact: a covariance of them is singular, and the square roots
    of its rounding errors would count. Elsewhere it is the Cholesky factor, or V sqrt(lambda) of the eigenvectors
    where the covariance is singular or nearly so.

    Raises:
        DataError: if there are fewer than 2 vectors, values are not finite, or the scatter is no scatter.
    """
    if isinstance(x, Gaussian):
        return x
    if not isinstance(x, Moments):
        features = as_features(x)
        if len(features) < 2:
            raise DataError("a Frechet distance needs at least 2 pictures on each side, and there is 1")
        if len(features) <= features.shape[1]:
            mean = features.mean(0)
            factor = (features - mean).T / np.sqrt(len(features) - 1)
            return Gaussian(len(features), mean, factor, float(np.vdot(factor, factor)))
        x = Moments.of(features)
    covariance = x.covariance()
    return Gaussian(x.n, x.mean, _factor(covariance, x.n - 1), float(np.trace(covariance)))


def frechet(x: ArrayLike | Moments | Gaussian, y: ArrayLike | Moments | Gaussian) -> float:
    """Squared Frechet distance |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of the fitted Gaussians.

    On Inception features it is FID (Heusel et al. 2017), covariances with the divisor N - 1. With factors
    S = F F^T the last trace is the sum of the singular values of F_x^T F_y (its square has the eigenvalues of
    S_x S_y), so that nothing is complex, nothing is added to the diagonal, and sqrt(rounding) does not enter: at a
    condition of 1e11, `sqrtm` and eigenvalues of the product are off by 1e-5. What is 0 can come out as -1e-14.

    The distance of N samples is too large by about C / N, see `jackknife`: never compare different N.

    Args:
        x: features (N, d), their moments, or `gaussian(...)` of either where it is used again.
        y: the other side, the same kinds; both sides need not be of one kind.

    Raises:
        DataError: if dimensions differ, a side has fewer than 2 vectors, or values are not finite.
    """
    a, b = gaussian(x), gaussian(y)
    if len(a.mean) != len(b.mean):
        raise DataError(f"the two sides have {len(a.mean)} and {len(b.mean)} features: use one extractor for both")
    difference = a.mean - b.mean
    between = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    return float(difference @ difference + (a.trace + b.trace - 2 * between))


def _factor(covariance: Array, most_rank: int) -> Array:
    """(d, r) with factor @ factor.T = covariance, which has at most rank `most_rank`."""
    d = len(covariance)
    if most_rank >= d:
        try:
            lower = np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)
        except np.linalg.LinAlgError:
            pass
        else:
            if lower.diagonal().min() ** 2 > WELL_CONDITIONED * covariance.diagonal().max():
                return lower
    values, vectors = np.linalg.eigh(covariance)
    largest = max(values[-1], 0.0)
    none = max(d - most_rank, 0)  # so many are 0 whatever the features are
    if values[0] < -NOT_A_COVARIANCE * largest or (none and values[none - 1] > NOT_A_COVARIANCE * largest):
        raise DataError(
            "this is no covariance of so few pictures: it has negative eigenvalues, or more that are not 0 than "
            "pictures; check the file and its n"
        )
    keep = values > d * EPS * largest  # the others are rounding
    keep[:none] = False
    return np.asarray(vectors[:, keep] * np.sqrt(values[keep]), dtype=np.float64)
