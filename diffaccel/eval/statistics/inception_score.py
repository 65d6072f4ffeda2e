"""The Inception Score."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.moments import Array, as_features


@dataclass(frozen=True)
class InceptionScore:
    """Inception Score over splits of the pictures.

    Attributes:
        value: mean over the splits, between 1 and the number of classes.
        std: standard deviation over the splits (divisor: their number), which tables print behind the mean.
        splits: their number.
    """

    value: float
    std: float
    splits: int


def inception_score(outputs: ArrayLike, splits: int = 10, *, probabilities: bool = False) -> InceptionScore:
    """Exponential of the mean KL divergence between the classes of a picture and those of its split.

    Salimans et al. 2016, section 4. 0 log 0 is 0, so that a network that is certain gives no NaN. The value rises with
    the pictures in a split: only numbers of equal N and splits compare. Split i holds the pictures i N // splits to
    (i + 1) N // splits in the order given; torch-fidelity and torchmetrics shuffle first. Pictures sorted by class
    need that, those in order of seeds do not.

    Args:
        outputs: (N, classes) logits; of the FID Inception, its 1008 without bias.
        splits: number of splits.
        probabilities: `outputs` are probabilities, each row with the sum 1.

    Raises:
        DataError: if there are fewer pictures than splits, values are not finite, or rows are no probabilities.
        ValueError: if `splits` is below 1.
    """
    table = as_features(outputs, "class outputs")
    if splits < 1:
        raise ValueError(f"the Inception Score needs at least 1 split, not {splits}")
    if len(table) < splits:
        raise DataError(f"{splits} splits need at least as many pictures, not {len(table)}")
    p = _checked(table) if probabilities else _softmax(table)
    bounds = [i * len(p) // splits for i in range(splits + 1)]
    parts = [p[low:high] for low, high in pairwise(bounds)]
    # the mean of sum p (log p - log q) is that of sum p log p less sum q log q, q being the mean of p
    scores = np.exp([_plogp(part).sum(1).mean() - _plogp(part.mean(0)).sum() for part in parts])
    return InceptionScore(float(scores.mean()), float(scores.std()), splits)


def _softmax(logits: Array) -> Array:
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def _checked(p: Array) -> Array:
    if (p < 0).any() or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise DataError("probabilities must be >= 0 and sum to 1 in every row; logits need probabilities=False")
    return p


def _plogp(p: Array) -> Array:
    return p * np.log(np.where(p > 0, p, 1.0))
