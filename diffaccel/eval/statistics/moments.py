"""Mean and scatter of features in float64, in pieces that merge: what a Frechet distance needs of a set of pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open

from diffaccel.eval.errors import DataError
from diffaccel.eval.files import save_tensors

Array = NDArray[np.float64]
ASYMMETRY = 1e-5  # of a published covariance, relative to its largest entry: some are stored in float32


@dataclass(frozen=True, eq=False)
class Moments:
    """First two moments of a set of feature vectors.

    Sums of squares are kept centred: raw sums X^T X lose the digits of features that vary little around a large mean.

    Attributes:
        n: number of vectors.
        mean: (d,) float64.
        m2: (d, d) float64, sum of (x - mean)(x - mean)^T.
    """

    n: int
    mean: Array
    m2: Array

    def __post_init__(self) -> None:
        d = self.mean.shape[0] if self.mean.ndim == 1 else 0
        if self.n < 1 or d < 1 or self.m2.shape != (d, d):
            raise DataError(
                f"moments are n >= 1, a mean (d,) and a scatter (d, d), not n={self.n}, {self.mean.shape} and "
                f"{self.m2.shape}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.m2).all()):
            raise DataError("moments must be finite: a NaN or inf means that the features or the file are damaged")

    @classmethod
    def of(cls, features: ArrayLike) -> Moments:
        """Moments of features (N, d), N >= 1.

        Raises:
            DataError: if the features are no finite (N, d) numbers, or none.
        """
        table = as_features(features)
        mean = table.mean(0)
        centred = table - mean
        return cls(len(table), mean, centred.T @ centred)

    @property
    def dim(self) -> int:
        """Features of a vector."""
        return len(self.mean)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub and LeVeque 1979, pairwise update).

        Merging is exact but for rounding, so that the last bits depend on the order: merge shards in index order.

        Raises:
            DataError: if the dimensions differ.
        """
        if self.dim != other.dim:
            raise DataError(f"moments of {self.dim} and {other.dim} features cannot be merged: use one extractor")
        n = self.n + other.n
        delta = other.mean - self.mean
        m2 = np.multiply.outer(delta, delta)
        m2 *= self.n * other.n / n
        m2 += self.m2
        m2 += other.m2
        return Moments(n, self.mean + delta * (other.n / n), m2)

    def covariance(self) -> Array:
        """(d, d) covariance with the divisor n - 1, as everybody's FID has it.

        Raises:
            DataError: if there is only one vector.
        """
        if self.n < 2:
            raise DataError("a covariance needs at least 2 pictures, and there is 1")
        return self.m2 / (self.n - 1)


def merge_all(parts: Sequence[Moments]) -> Moments:
    """Moments of all parts, merged from first to last: the same parts in the same order give the same bits.

    Raises:
        DataError: if there are none, or their dimensions differ.
    """
    if not parts:
        raise DataError("there are no moments to merge: give at least one shard")
    return reduce(Moments.merge, parts)


def as_features(features: ArrayLike, what: str = "features") -> Array:
    """(N, d) float64 of anything that NumPy takes as an array.

    Raises:
        DataError: if it is no table of finite real numbers with at least one row and column.
    """
    table = np.asarray(features)
    if table.ndim != 2 or not table.size or table.dtype.kind not in "fiu":
        raise DataError(f"{what} must be numbers (N, d), one row for each picture, not {table.dtype} {table.shape}")
    table = table.astype(np.float64, copy=False)
    if not np.isfinite(table).all():
        row = int(np.flatnonzero(~np.isfinite(table).all(1))[0])
        raise DataError(f"{what} must be finite, and row {row} is not: its picture or the network is damaged")
    return table


def save_moments(moments: Moments, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write moments as safetensors: `n`, `mean`, and `m2` as its upper triangle row by row.

    At d = 2048 that are 17 MB: save them of runs and references, and of shards rather the features.

    Args:
        moments: what is saved.
        path: file; it appears whole or not at all.
        metadata: what the moments were made of, text by name; `load_moments` gives it back.
    """
    upper = moments.m2[np.triu_indices(moments.dim)]
    save_tensors({"n": np.array([moments.n]), "mean": moments.mean, "m2": upper}, Path(path), metadata)


def load_moments(path: str | os.PathLike[str]) -> tuple[Moments, dict[str, str]]:
    """Moments and metadata that `save_moments` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is damaged, or holds something else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            n, mean, upper = (file.get_tensor(name) for name in ("n", "mean", "m2"))
    except SafetensorError as error:
        raise DataError(
            f"{path} holds no moments, or is damaged ({error}); write it again with save_moments"
        ) from error
    d = mean.size
    if n.shape != (1,) or mean.shape != (d,) or upper.shape != (d * (d + 1) // 2,):
        raise DataError(
            f"{path} holds no moments: its n, mean and m2 have shapes {n.shape}, {mean.shape}, {upper.shape}"
        )
    m2 = np.zeros((d, d))
    m2[np.triu_indices(d)] = upper
    m2 += np.triu(m2, 1).T
    return Moments(int(n[0]), mean.astype(np.float64), m2), metadata


def import_npz(path: str | os.PathLike[str], n: int | None = None) -> Moments:
    """Moments of an `.npz` with `mu` and `sigma`, as pytorch-fid, clean-fid, ADM and EDM publish them.

    Nothing is unpickled. A Frechet distance is all that such a file allows; KID and the others need features.

    Args:
        path: the file.
        n: number of pictures it was made of, where the file does not say (key `n`). The bias of FID depends on it.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if the file has no `mu` and `sigma` that are a mean and a covariance, or nobody says n.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("mu", "sigma", "n") if name in file}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib, OSError, ValueError, TypeError: whatever the damage looks like
        raise DataError(
            f"{path} is no .npz of plain arrays, or is damaged ({error}); pickled files are not read"
        ) from error
    if not {"mu", "sigma"} <= found.keys():
        raise DataError(f"{path} has no `mu` and `sigma`; statistics of FID are an .npz with these two arrays")
    if n is None:
        if "n" not in found:
            raise DataError(
                f"{path} does not say how many pictures it was made of; write {Path(path).name}:50000, or n=50000"
            )
        n = int(found["n"])
    mu, sigma = (np.asarray(found[name], dtype=np.float64) for name in ("mu", "sigma"))
    if n < 2 or mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise DataError(f"`mu` (d,), `sigma` (d, d) and n >= 2 are wanted, not {mu.shape}, {sigma.shape} and {n}")
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max():
        raise DataError(f"`sigma` of {path} is not symmetric, so that it is no covariance")
    return Moments(n, mu, (sigma + sigma.T) * ((n - 1) / 2))
