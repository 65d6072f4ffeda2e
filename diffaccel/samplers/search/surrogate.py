"""A small model that guesses the error of a sampler it has not seen: kernel ridge regression, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffaccel.samplers.schedule import FloatArray

MOST = 300  # points it is fitted to: the best ones, and every k-th of the others
WIDTHS = (0.5, 1.0, 2.0, 4.0)  # of the kernel, in median distances
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
CLIP = 4.0  # targets beyond this many e-folds above the best tell nothing


@dataclass(frozen=True)
class Surrogate:
    """Mean of a Gaussian process with a squared-exponential kernel; its width and noise are chosen by leaving one out.

    The performance predictor of USF (S3, ICLR 2024) is a small network on one-hot decisions, trained by a ranking loss;
    with some hundred points a kernel on the weights of the table is as good and has nothing to train.
    """

    points: FloatArray
    weights: FloatArray
    mean: float
    width: float
    centre: FloatArray
    scale: FloatArray

    @classmethod
    def fit(cls, features: FloatArray, targets: FloatArray) -> Surrogate:
        """(n, d) features and (n,) targets; of many the best are kept and a sample of the others."""
        ranked = np.argsort(targets, kind="stable")
        if len(ranked) > MOST:
            half = MOST // 2
            rest = ranked[half:]
            ranked = np.concatenate([ranked[:half], rest[np.linspace(0, len(rest) - 1, half).astype(int)]])
        x, y = features[ranked], np.minimum(targets[ranked], targets[ranked[0]] + CLIP)
        centre, scale = x.mean(0), x.std(0)
        scale = np.where(scale > 1e-9, scale, 1.0)
        x = (x - centre) / scale
        squares = _squares(x, x)
        typical = float(np.median(squares[squares > 0])) if (squares > 0).any() else 1.0
        mean = float(y.mean())
        best = (np.inf, np.zeros(len(x)), typical)
        for factor in WIDTHS:
            width = typical * factor**2
            values, vectors = np.linalg.eigh(np.exp(-squares / (2 * width)))
            for ridge in RIDGES:
                inverse = (vectors / (values.clip(0) + ridge)) @ vectors.T
                weights = inverse @ (y - mean)
                missed = float(np.square(weights / np.diag(inverse)).mean())  # leaving each point out
                if missed < best[0]:
                    best = (missed, weights, width)
        return cls(x, best[1], mean, best[2], centre, scale)

    def __call__(self, features: FloatArray) -> FloatArray:
        """(n,) guesses."""
        x = (features - self.centre) / self.scale
        return self.mean + np.exp(-_squares(x, self.points) / (2 * self.width)) @ self.weights


def rank_correlation(a: FloatArray, b: FloatArray) -> float:
    """Spearman's; 0 where one of them is constant."""
    first, second = (np.argsort(np.argsort(v, kind="stable"), kind="stable") for v in (a, b))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _squares(a: FloatArray, b: FloatArray) -> FloatArray:
    total = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return total.clip(0)
