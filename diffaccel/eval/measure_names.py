"""Names of all measures, and what each must be given."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from torch import Tensor

from diffaccel.eval.errors import DataError
from diffaccel.eval.measures import SET_MEASURES
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.paired import PAIRED_MEASURES

PictureMeasure = Callable[[Tensor, Tensor], Tensor]
# Measures of a picture and its prompt, or of two pictures, that a CLIP model gives.
CLIP_MEASURES = ("clip", "clip_distance")
MEASURES = (*SET_MEASURES, *CLIP_MEASURES, *PAIRED_MEASURES)
DEFAULT = ("fd", "kd", "cmmd", "clip", "lpips", "ssim", "psnr", "latent_mse", "clip_distance")


def check_measures(measures: Sequence[str]) -> None:
    """Raise ValueError for a name that is none of `MEASURES`."""
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise ValueError(
            f"unknown measure {', '.join(unknown)}; there are {', '.join(MEASURES)} (FID and KID are fd and kd of the "
            "network inception)"
        )


def check_networks(extractors: Sequence[Extractor]) -> None:
    """Raise ValueError where two networks have one name: columns go by it, one would take the place of the other."""
    names = [extractor.name for extractor in extractors]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two networks are called {', '.join(twice)}, and their columns would be too; compare with one of them at "
            "a time, each resize protocol or file of weights in a table of its own"
        )


def check_inputs(
    extractors: Sequence[Extractor],
    measures: Sequence[str],
    reference: str | os.PathLike[str] | None,
    lpips: PictureMeasure | str,
) -> None:
    """Raise DataError where a measure lacks its network, weights or reference, before anything is computed."""
    lacking = unsuited(extractors, measures)
    if reference is None:
        lacking += [f"{key} needs a reference" for key in measures if _compares(key)]
    if isinstance(lpips, str) and "lpips" in measures:
        lacking.append(f"lpips: {lpips}")
    if lacking:
        raise DataError("; ".join(lacking))


def _compares(key: str) -> bool:
    return key in SET_MEASURES and SET_MEASURES[key].needs_reference


def unsuited(extractors: Sequence[Extractor], measures: Sequence[str]) -> list[str]:
    """Which measures no network that was given suits: they get no column."""
    clip = any(extractor.text is not None for extractor in extractors)
    found = []
    for key in measures:
        kind, there = "clip", clip
        if key in SET_MEASURES:
            kind, there = SET_MEASURES[key].networks, any(map(SET_MEASURES[key].suits, extractors))
        if key not in PAIRED_MEASURES and not there:
            needed = {
                "clip": "a network with CLIP's text side",
                "inception": "the Inception of FID",
                "any": "a network",
            }
            found.append(f"{key!r} needs the features of {needed[kind]}")
    return found
