"""Measures of a whole set of pictures, by name: what each needs, how it is titled, which way is better.

A measure sees the features of a set, cut into groups, and the reference; where the jackknife applies it gives
replicates, from which come standard errors and the standard errors of differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.reports.table import Better, Column
from diffaccel.eval.runs.reference_set import ReferenceSet
from diffaccel.eval.statistics.frechet import Gaussian, frechet, gaussian
from diffaccel.eval.statistics.inception_score import inception_score
from diffaccel.eval.statistics.jackknife import Estimate, Replicates, replicates
from diffaccel.eval.statistics.mmd import cmmd, cmmd_unbiased, cmmd_unbiased_replicates, kid_full, kid_full_replicates
from diffaccel.eval.statistics.moments import Moments
from diffaccel.eval.statistics.neighbours import neighbours

Features = Mapping[str, NDArray[np.float32]]
Outcome = Replicates | Estimate | str  # a string says why there is no number
NO_FEATURES = "the reference holds moments only, no features"


@dataclass(frozen=True)
class SetMeasure:
    """A measure of a set of pictures.

    Attributes:
        short: name where the network is part of the title: `FD` gives `FD[emoji-clip]`.
        known_as: title with the FID Inception, where the number has a name of its own: `FID`.
        better: which way.
        digits: after the point.
        compute: features, groups of their indices, reference -> outcome; DataError where there are too few pictures.
        networks: which extractors it is defined for: any, those with a text side (CLIP), or the FID Inception.
        needs_reference: whether it compares with a reference; what does not is given None.
    """

    short: str
    known_as: str
    better: Better
    digits: int
    compute: Callable[[Features, Sequence[Sequence[int]], Any], Outcome]
    networks: Literal["any", "clip", "inception"] = "any"
    needs_reference: bool = True

    def suits(self, extractor: Extractor) -> bool:
        """Whether the measure is defined for this network."""
        if self.networks == "clip":
            return extractor.text is not None
        return self.networks == "any" or extractor.name == "inception"

    def column(self, key: str, extractor: Extractor) -> Column:
        """Its column; only numbers of the FID Inception go by the bare name."""
        named = extractor.name == "inception" and self.known_as
        title = self.known_as if named else f"{self.short}[{extractor.name}]"
        return Column(f"{key}[{extractor.name}]", title, "", self.better, self.digits)


def _jackknifed(groups: Sequence[Sequence[int]]) -> bool:
    """Whether 2 pictures are left without any of the groups: fewer have no covariance and no pairs."""
    sizes = [len(group) for group in groups]
    return len(sizes) >= 2 and sum(sizes) - max(sizes) >= 2


def _frechet(features: Features, groups: Sequence[Sequence[int]], reference: ReferenceSet, name: str) -> Outcome:
    values = features[name].astype(np.float64)
    target = reference.gaussian
    if name != "features":
        if reference.features is None or name not in reference.features:
            return f"the reference has no {name} features"
        target = gaussian(reference.features[name])
    return frechet_by_groups(values, groups, target)


def frechet_by_groups(
    values: NDArray[np.float64], groups: Sequence[Sequence[int]], target: Gaussian
) -> Replicates | Estimate:
    """Frechet distance of features (N, d) and, where the groups allow it, without each of them."""
    if not _jackknifed(groups):
        return Estimate(frechet(values, target), n=len(values))
    parts = [values[list(group)] for group in groups]
    few = len(values) <= values.shape[1]  # the exact low-rank path needs the features themselves
    return replicates(lambda x: frechet(x, target), parts if few else [Moments.of(part) for part in parts])


def _kernel(
    features: Features,
    groups: Sequence[Sequence[int]],
    reference: ReferenceSet,
    plain: Callable[[NDArray[np.float64], NDArray[np.float32]], float],
    jackknife: Callable[[Sequence[NDArray[np.float64]], NDArray[np.float32]], Replicates],
) -> Outcome:
    if reference.features is None:
        return NO_FEATURES
    values, target = features["features"].astype(np.float64), reference.features["features"]
    if not _jackknifed(groups):
        return Estimate(plain(values, target), n=len(values))
    return jackknife([values[list(group)] for group in groups], target)


def _cmmd(features: Features, groups: Sequence[Sequence[int]], reference: ReferenceSet) -> Outcome:
    if reference.features is None:
        return NO_FEATURES
    value = cmmd(features["features"], reference.features["features"])
    return Estimate(value, n=len(features["features"]))


def _inception_score(features: Features, groups: Sequence[Sequence[int]], reference: object) -> Outcome:
    if "logits" not in features:
        return "these weights have no classifier"
    if len(features["logits"]) < 10:
        return "needs at least 10 pictures"
    score = inception_score(features["logits"])
    return Estimate(score.value, n=len(features["logits"]))


def _neighbours(features: Features, groups: Sequence[Sequence[int]], reference: ReferenceSet, field: str) -> Outcome:
    if reference.features is None:
        return NO_FEATURES
    result = neighbours(features["features"], reference.features["features"])
    return Estimate(getattr(result, field), n=len(features["features"]))


SET_MEASURES: dict[str, SetMeasure] = {
    "fd": SetMeasure("FD", "FID", "lower", 3, partial(_frechet, name="features")),
    "kd": SetMeasure("KD", "KID", "lower", 5, partial(_kernel, plain=kid_full, jackknife=kid_full_replicates)),
    "cmmd": SetMeasure("CMMD", "", "lower", 3, _cmmd, "clip"),
    "cmmd_unbiased": SetMeasure(
        "CMMD unbiased",
        "",
        "lower",
        3,
        partial(_kernel, plain=cmmd_unbiased, jackknife=cmmd_unbiased_replicates),
        "clip",
    ),
    "sfid": SetMeasure("sFID", "sFID", "lower", 3, partial(_frechet, name="spatial"), "inception"),
    "is": SetMeasure("IS", "IS", "higher", 3, _inception_score, "inception", needs_reference=False),
    "precision": SetMeasure("precision", "", "higher", 3, partial(_neighbours, field="precision")),
    "recall": SetMeasure("recall", "", "higher", 3, partial(_neighbours, field="recall")),
    "density": SetMeasure("density", "", "higher", 3, partial(_neighbours, field="density")),
    "coverage": SetMeasure("coverage", "", "higher", 3, partial(_neighbours, field="coverage")),
}
