"""The Inception Score against what it must be, and against everybody else's on the same logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.inception_score import inception_score
from diffaccel.eval.statistics.moments import Array

LOGITS = 2 * np.random.default_rng(0).standard_normal((207, 13))


def test_bounds() -> None:
    assert inception_score(np.zeros((20, 7))).value == pytest.approx(1.0)  # a network that knows nothing
    certain = 1e4 * np.eye(7)[np.arange(70) % 7]  # one that knows all, of pictures of all classes: exp gives 0 and 1
    result = inception_score(certain)
    assert (result.value, result.std, result.splits) == pytest.approx((7.0, 0.0, 10))
    assert inception_score(np.repeat(certain[:1], 20, axis=0)).value == pytest.approx(1.0)  # one class only


def test_agrees_with_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    theirs = metric.isc_features_to_metric(torch.from_numpy(LOGITS), splits=10, shuffle=False)
    ours = inception_score(LOGITS)
    expected = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert (ours.value, ours.std) == pytest.approx(expected, rel=1e-6)


def test_agrees_with_torchmetrics_on_one_split() -> None:
    image = pytest.importorskip("torchmetrics.image.inception")
    metric = image.InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(torch.from_numpy(LOGITS))
    assert inception_score(LOGITS, splits=1).value == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_the_others_give_nan_where_the_network_is_certain() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    certain = torch.from_numpy(1e4 * np.eye(7)[np.arange(70) % 2])
    assert math.isnan(metric.isc_features_to_metric(certain, splits=1)["inception_score_mean"])
    assert inception_score(certain, splits=1).value == pytest.approx(2.0)


def test_probabilities_are_taken_as_they_are() -> None:
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    ours = inception_score(p, probabilities=True)
    assert ours.value == pytest.approx(inception_score(LOGITS).value, rel=1e-12)


@pytest.mark.parametrize(
    ("outputs", "options", "match"),
    [
        (LOGITS, {"probabilities": True}, "logits need probabilities=False"),
        (np.full((10, 4), 0.3), {"probabilities": True}, "sum to 1"),
        (LOGITS[:9], {}, "10 splits need at least as many pictures, not 9"),
        (np.full((10, 4), np.nan), {}, "finite"),
        (LOGITS[0], {}, r"\(N, d\)"),
        (LOGITS, {"splits": 0}, "at least 1 split"),
    ],
)
def test_bad_input_is_refused(outputs: Array, options: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        inception_score(outputs, **options)
    assert isinstance(caught.value, DataError) == ("splits" not in options)
