"""Set measures by name: which network each is for, what it is called, and jackknife errors that mean something."""

from __future__ import annotations

import numpy as np
import pytest

from diffaccel.eval import DataError, Estimate, Extractor, frechet, gaussian, kid_full
from diffaccel.eval.measures import NO_FEATURES, SET_MEASURES, Features, Outcome
from diffaccel.eval.runs.reference_set import ReferenceSet
from diffaccel.eval.statistics.inception_score import inception_score
from diffaccel.eval.statistics.jackknife import Replicates
from tests.eval.noise_pipe import colours
from tests.eval.offline import _no_network  # noqa: F401

D = 8


def named(name: str, text: bool = False) -> Extractor:
    plain = colours(text=text)
    return Extractor(name, plain.dim, plain.size, plain.protocol, "", plain.network, plain.text)


def drawn(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32) + np.float32(shift)


def reference_of(values: np.ndarray, **others: np.ndarray) -> ReferenceSet:
    return ReferenceSet("real", "0", len(values), gaussian(values), {"features": values, **others})


def groups_of(n: int, count: int) -> list[list[int]]:
    return [list(part) for part in np.array_split(np.arange(n), count)]


def computed(key: str, features: Features, groups: list[list[int]], reference: ReferenceSet | None) -> Outcome:
    return SET_MEASURES[key].compute(features, groups, reference)


def test_names_of_columns_say_the_network_unless_it_is_that_of_fid() -> None:
    titles = {key: measure.column(key, named("inception")).title for key, measure in SET_MEASURES.items()}
    assert [titles[key] for key in ("fd", "kd", "sfid", "is")] == ["FID", "KID", "sFID", "IS"]
    assert titles["precision"] == "precision[inception]"
    assert SET_MEASURES["fd"].column("fd", named("dinov2/large")).title == "FD[dinov2/large]"
    keys = {measure.column(key, named("x")).key for key, measure in SET_MEASURES.items()}
    assert len(keys) == len(SET_MEASURES)


@pytest.mark.parametrize(
    ("name", "text", "unsuited"),
    [
        ("inception", False, {"cmmd", "cmmd_unbiased"}),
        ("open_clip/ViT-B-32", True, {"sfid", "is"}),
        ("dinov2/large", False, {"cmmd", "cmmd_unbiased", "sfid", "is"}),
    ],
)
def test_each_measure_has_its_networks(name: str, text: bool, unsuited: set[str]) -> None:
    assert {key for key, measure in SET_MEASURES.items() if not measure.suits(named(name, text))} == unsuited


@pytest.mark.parametrize("n", [6, 60])
def test_replicates_leave_one_group_out(n: int) -> None:
    """With fewer pictures than features, and with more."""
    x, y = drawn(n, 0), drawn(50, 1)
    groups = groups_of(n, 3)
    for key, plain in (("fd", frechet), ("kd", kid_full)):
        found = computed(key, {"features": x}, groups, reference_of(y))
        assert isinstance(found, Replicates)
        assert found.value == pytest.approx(plain(x, y), rel=1e-9, abs=1e-12)
        for group, left_out in zip(groups, found.left_out, strict=True):
            rest = np.delete(x, group, axis=0)
            assert left_out == pytest.approx(plain(rest, y), rel=1e-12 if n < D else 1e-9, abs=1e-12)


@pytest.mark.parametrize(("n", "count"), [(2, 2), (3, 1), (1, 1), (3, 2)])
def test_too_few_for_a_jackknife_have_a_plain_value_or_a_reason(n: int, count: int) -> None:
    x, reference = drawn(n, 0), reference_of(drawn(50, 1))
    for key in ("fd", "kd", "cmmd_unbiased"):
        if n < 2:
            with pytest.raises(DataError, match="at least 2 pictures"):
                computed(key, {"features": x}, groups_of(n, count), reference)
        else:
            found = computed(key, {"features": x}, groups_of(n, count), reference)
            assert isinstance(found, Estimate)
            assert (found.se, found.n) == (None, n)


def test_spatial_features_have_a_reference_of_their_own() -> None:
    x, y, z = drawn(60, 0), drawn(50, 1), drawn(50, 2, shift=3)
    found = computed("sfid", {"features": x, "spatial": x}, groups_of(60, 5), reference_of(y, spatial=z))
    assert isinstance(found, Replicates)
    assert found.value == pytest.approx(frechet(x, z), rel=1e-9)
    assert computed("sfid", {"features": x, "spatial": x}, groups_of(60, 5), reference_of(y)) == (
        "the reference has no spatial features"
    )


def test_moments_suffice_for_frechet_alone() -> None:
    x, y = drawn(60, 0), drawn(50, 1)
    moments = ReferenceSet("real", "0", 50, gaussian(y), None)
    for key in ("kd", "cmmd", "cmmd_unbiased", "precision", "coverage"):
        assert computed(key, {"features": x}, groups_of(60, 5), moments) == NO_FEATURES
    found = computed("fd", {"features": x}, groups_of(60, 5), moments)
    assert isinstance(found, Replicates)
    assert found.value == pytest.approx(frechet(x, y), rel=1e-9)


def test_inception_score_needs_a_classifier_and_no_reference() -> None:
    assert not SET_MEASURES["is"].needs_reference
    assert all(SET_MEASURES[key].needs_reference for key in SET_MEASURES if key != "is")
    logits = np.random.default_rng(0).normal(size=(40, 1008)).astype(np.float32) * 3
    features = {"features": drawn(40, 0), "logits": logits}
    found = computed("is", features, groups_of(40, 5), None)
    assert found == Estimate(inception_score(logits).value, n=40)
    assert computed("is", {"features": drawn(40, 0)}, groups_of(40, 5), None) == "these weights have no classifier"
    few = {"features": drawn(9, 0), "logits": logits[:9]}
    assert computed("is", few, groups_of(9, 3), None) == "needs at least 10 pictures"


def test_the_difference_of_two_sets_is_better_known_than_either() -> None:
    x, y = drawn(200, 0), drawn(300, 1)
    a, b = (
        computed("fd", {"features": values}, groups_of(200, 20), reference_of(y))
        for values in (x, x + np.random.default_rng(5).normal(size=x.shape).astype(np.float32) / 50)
    )
    assert isinstance(a, Replicates)
    assert isinstance(b, Replicates)
    difference, alone = (b - a).estimate(), a.estimate()
    assert difference.se is not None
    assert alone.se is not None
    assert difference.se < alone.se / 5
