"""Scores of runs: every measure of every run, differences to the baseline, and the protocol that they share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diffaccel.eval.errors import DataError, ProtocolMismatch
from diffaccel.eval.fidelity import psnr
from diffaccel.eval.measure_names import (
    CLIP_MEASURES,
    DEFAULT,
    PictureMeasure,
    check_inputs,
    check_measures,
    check_networks,
    unsuited,
)
from diffaccel.eval.measures import SET_MEASURES, Features, Outcome, SetMeasure
from diffaccel.eval.networks.clip import clip_score
from diffaccel.eval.networks.extractor import Extractor
from diffaccel.eval.paired import PAIRED_MEASURES, average, compare_latents, compare_pictures
from diffaccel.eval.protocol import comparable, protocol_of, protocol_text
from diffaccel.eval.reports.table import Column, Row, Table, Value, delta_column
from diffaccel.eval.runs.features import extract
from diffaccel.eval.runs.manifest import digest
from diffaccel.eval.runs.reference_set import ReferenceSet, load_reference
from diffaccel.eval.runs.run import Run, jackknife_groups
from diffaccel.eval.ssim import ssim
from diffaccel.eval.statistics.jackknife import GROUPS, Replicates

Array = NDArray[np.float64]


@dataclass
class Scores:
    """Columns and rows of one group of runs that can be compared.

    Attributes:
        columns: by key, in the order of the table.
        values: row name -> column key -> value.
        per_picture: column key -> row name -> (N,) numbers, of measures that have one for each picture.
        protocol: what all rows have in common.
        footnotes: remarks on the whole table.
        strict: whether a missing number is an error.
    """

    columns: dict[str, Column] = field(default_factory=dict)
    values: dict[str, dict[str, Value]] = field(default_factory=dict)
    per_picture: dict[str, dict[str, Array]] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    footnotes: list[str] = field(default_factory=list)
    strict: bool = False

    def put(self, row: str, column: Column, value: Value | ValueError) -> None:
        """Set a value, or the reason why there is none, and make its column known; the reason is raised if strict."""
        if self.strict and isinstance(value, str | ValueError):
            raise value if isinstance(value, ValueError) else DataError(f"no {column.title} of {row}: {value}")
        self.columns.setdefault(column.key, column)
        self.values.setdefault(row, {})[column.key] = str(value) if isinstance(value, ValueError) else value

    def table(self, title: str, runs: Mapping[str, Run], manifest: dict[str, Any]) -> Table:
        """The table of these scores; rows in the order of `runs`."""
        text = protocol_text(self.protocol)
        identity = digest(self.protocol)
        rows = [
            Row(name, self.values.get(name, {}), identity, text, str(run.folder), run.warnings())
            for name, run in runs.items()
        ]
        about = {"protocol": self.protocol, **manifest}
        return Table(title, tuple(self.columns.values()), tuple(rows), tuple(self.footnotes), about)


def score(
    runs: Mapping[str, Run],
    *,
    extractors: Sequence[Extractor],
    measures: Sequence[str] = DEFAULT,
    reference: str | os.PathLike[str] | None = None,
    lpips: PictureMeasure | str = "no LPIPS weights were given",
    strict: bool = False,
    progress: bool = True,
) -> Scores:
    """Scores of runs that can be compared (`comparable`), the first of which is the baseline.

    Args:
        runs: row name -> run.
        extractors: networks of the set measures, and of the CLIP measures where they have a text side.
        measures: some of `diffaccel.eval.measure_names.MEASURES`; one that cannot be had becomes a reason in the table.
        reference: what the set measures compare with, see `load_reference`.
        lpips: function of two batches of pictures in [0, 1], or the reason why there is none.
        strict: raise where a measure cannot be had, instead of telling the reason in the table.
        progress: show progress bars.

    Raises:
        ValueError: for an unknown measure, or two networks of one name.
        ProtocolMismatch: if the runs are not comparable; if strict, if the reference is another extractor's.
        DataError: if pictures or the reference are damaged; if strict, if a measure cannot be had.
    """
    check_measures(measures)
    check_networks(extractors)
    if strict:
        check_inputs(extractors, measures, reference, lpips)
    if len(comparable(runs)) > 1:
        raise ProtocolMismatch("these runs differ in prompts, seeds or number of pictures; score each group by itself")
    baseline = next(iter(runs.values()))
    result = Scores(protocol=protocol_of(baseline, extractors), strict=strict)
    result.footnotes += [f"No column: {reason}." for reason in unsuited(extractors, measures)]
    for extractor in extractors:
        features = {name: extract(run.folder, extractor, progress=progress) for name, run in runs.items()}
        found = _reference(reference, extractor, progress)
        if isinstance(found, ReferenceSet):
            told = f"{found.name}, {found.n} pictures, {found.digest}"
            result.protocol["extractors"][extractor.id]["reference"] = told
            _note_few(result, extractor, min(len(baseline.paths), found.n), measures)
        _score_sets(result, runs, extractor, features, found, [m for m in measures if m in SET_MEASURES])
        if extractor.text is not None:
            _score_clip(result, runs, extractor, features, [m for m in measures if m in CLIP_MEASURES])
    functions: dict[str, PictureMeasure | str] = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
    if "lpips" in measures and not isinstance(lpips, str):
        name = getattr(lpips, "name", getattr(lpips, "__name__", "a function"))
        result.protocol["lpips"] = "-".join(filter(None, [name, getattr(lpips, "weights", "")[:8]]))
    for key in (m for m in measures if m in PAIRED_MEASURES):
        _score_pairs(result, runs, key, functions.get(key, ""))
    return result


def _note_few(result: Scores, extractor: Extractor, count: int, measures: Sequence[str]) -> None:
    if count <= extractor.dim and "fd" in measures:
        title = SET_MEASURES["fd"].column("fd", extractor).title
        result.footnotes.append(
            f"{title} of {count} pictures says little: there are more features, {extractor.dim}, than pictures."
        )


def _reference(
    source: str | os.PathLike[str] | None, extractor: Extractor, progress: bool
) -> ReferenceSet | ValueError:
    if source is None:
        return DataError("no reference was given")
    try:
        return load_reference(source, extractor, progress=progress)
    except ProtocolMismatch as error:
        return error


def _score_sets(
    result: Scores,
    runs: Mapping[str, Run],
    extractor: Extractor,
    features: Mapping[str, Features],
    reference: ReferenceSet | ValueError,
    measures: Sequence[str],
) -> None:
    first = next(iter(runs))
    for key in measures:
        measure = SET_MEASURES[key]
        if not measure.suits(extractor):
            continue
        column = measure.column(key, extractor)
        outcomes = {}
        for name, run in runs.items():
            groups = jackknife_groups(run.ids, GROUPS)
            outcomes[name] = _outcome(measure, features[name], groups, reference)
            found = outcomes[name]
            result.put(name, column, found.estimate() if isinstance(found, Replicates) else found)
        if len(runs) > 1 and isinstance(outcomes[first], Replicates):
            for name, found in list(outcomes.items())[1:]:
                if isinstance(found, Replicates):  # else the column of values says why there is none
                    result.put(name, delta_column(column), (found - outcomes[first]).estimate())


def _outcome(
    measure: SetMeasure, features: Features, groups: Sequence[Sequence[int]], reference: ReferenceSet | ValueError
) -> Outcome | ValueError:
    if isinstance(reference, ValueError) and measure.needs_reference:
        return reference
    try:
        return measure.compute(features, groups, reference if measure.needs_reference else None)
    except DataError as error:
        return error


def _score_clip(
    result: Scores,
    runs: Mapping[str, Run],
    extractor: Extractor,
    features: Mapping[str, Features],
    measures: Sequence[str],
) -> None:
    first, ids = next(iter(runs)), next(iter(runs.values())).ids
    images = {name: torch.from_numpy(values["features"]) for name, values in features.items()}
    if "clip" in measures:
        column = Column(f"clip[{extractor.name}]", f"CLIP[{extractor.name}]", "", "higher", 2)
        texts = _text_features(result, extractor, runs[first].prompts)
        scores = {name: clip_score(values, texts).double().numpy() for name, values in images.items()}
        result.per_picture[column.key] = scores
        for name, values in scores.items():
            result.put(name, column, average(values, ids, "mean"))
            if name != first:
                result.put(name, delta_column(column), average(values - scores[first], ids, "mean"))
    if "clip_distance" in measures and len(runs) > 1:
        column = Column(f"clip_distance[{extractor.name}]", f"{extractor.name} distance", "", "lower", 4)
        distances = {
            name: 1 - F.cosine_similarity(values.double(), images[first].double(), dim=1)
            for name, values in images.items()
            if name != first
        }
        result.per_picture[column.key] = {name: values.numpy() for name, values in distances.items()}
        for name, values in distances.items():
            result.put(name, column, average(values.numpy(), ids, "mean"))


def _text_features(result: Scores, extractor: Extractor, prompts: Sequence[str]) -> Tensor:
    """(N, d) features of the prompts, each text encoded once; what the network warns of goes below the table."""
    assert extractor.text is not None
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        features = extractor.text(list(place))
    result.footnotes += [f"{extractor.name}: {entry.message}." for entry in caught]
    return features[[place[prompt] for prompt in prompts]]


def _score_pairs(result: Scores, runs: Mapping[str, Run], key: str, function: PictureMeasure | str) -> None:
    measure, (first, baseline) = PAIRED_MEASURES[key], next(iter(runs.items()))
    for name, run in runs.items():
        if name == first:
            continue
        if key == "latent_mse":
            values = compare_latents(run, baseline)
        else:
            values = function if isinstance(function, str) else compare_pictures(run, baseline, function)
        if isinstance(values, str):
            result.put(name, measure.column, values)
            continue
        result.per_picture.setdefault(key, {})[name] = values
        result.put(name, measure.column, average(values, run.ids, measure.average))
