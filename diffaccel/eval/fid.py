"""The plain FID of two folders of pictures, with what one must know to compare it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffaccel.eval.images import Alpha, list_pictures
from diffaccel.eval.measures import frechet_by_groups
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.runs.features import extract
from diffaccel.eval.runs.reference_set import load_reference
from diffaccel.eval.statistics.jackknife import GROUPS, Estimate, Replicates
from diffaccel.eval.statistics.mmd import kid_full

T_95 = 2.09  # Student's t, 19 degrees of freedom


@dataclass(frozen=True)
class FolderDistance:
    """Distances between two sets of pictures.

    Attributes:
        network: name of the extractor; only `inception` makes an FID.
        protocol: extractor, weights and resize protocol in one word.
        n: pictures of the first set.
        m: pictures of the second set.
        frechet: Frechet distance, with a jackknife error over the first set.
        kernel: KID of all pairs (unbiased); None against moments.
        deficient: whether a side has no more pictures than features: the value says little then.
        skipped: damaged pictures of both folders that were left out.
    """

    network: str
    protocol: str
    n: int
    m: int
    frechet: Estimate
    kernel: float | None
    deficient: bool
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        known = self.network == "inception"
        names = ("FID", "KID") if known else (f"FD[{self.network}]", f"KD[{self.network}]")
        lines = [f"{names[0]} {_four(self.frechet.value)}"]
        if self.frechet.se is not None and self.frechet.corrected is not None:
            low, high = (_four(self.frechet.corrected + side * T_95 * self.frechet.se) for side in (-1, 1))
            what = f"without the bias of {self.n} pictures on the first side"
            lines.append(f"  {_four(self.frechet.corrected)} {what}, 95 % from {low} to {high}")
        if self.kernel is not None:
            lines.append(f"{names[1]} {self.kernel:.6f} (all pairs, unbiased)")
        lines.append(f"{self.n} against {self.m} pictures, {self.protocol}; compare only with the same numbers of them")
        if self.skipped:
            lines.append(f"left out, since they cannot be read: {self.skipped} pictures")
        if self.deficient:
            lines.append("a side has no more pictures than there are features: too few for a number to publish")
        return "\n".join(lines)


def _four(value: float) -> str:
    """Four digits, and no minus before 0."""
    return f"{round(value, 4) + 0.0:.4f}"


def fid(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    extractor: Extractor,
    *,
    alpha: Alpha | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> FolderDistance:
    """Distance of the pictures in `a` to those in `b`, which may also be a file (`load_reference`).

    The jackknife leaves out a twentieth of `a` at a time, with `b` as it is: value, error and correction are for other
    draws of `a`. The bias that the size of `b` brings stays in all of them. All this is for sets drawn independently:
    of two runs with the same noise the plain distance has less bias, and the correction takes too much off.

    Raises:
        DataError: if a folder has fewer than 2 pictures, or damaged ones.
    """
    features = extract(a, extractor, alpha=alpha, skip_bad=skip_bad, progress=progress)["features"].astype(np.float64)
    reference = load_reference(b, extractor, alpha=alpha, skip_bad=skip_bad, progress=progress)
    n, d = features.shape
    groups = [] if n < 2 * GROUPS else [part.tolist() for part in np.array_split(np.arange(n), GROUPS)]
    found = frechet_by_groups(features, groups, reference.gaussian)
    distance = found.estimate() if isinstance(found, Replicates) else found
    kernel = None if reference.features is None else kid_full(features, reference.features["features"])
    deficient = min(n, reference.n) <= d
    skipped = _listed(a) - n + (_listed(b) - reference.n if Path(b).is_dir() else 0) if skip_bad else 0
    return FolderDistance(extractor.name, extractor.id, n, reference.n, distance, kernel, deficient, skipped)


def _listed(folder: str | os.PathLike[str]) -> int:
    return len(list_pictures(folder))
