"""KID and CMMD against the kernels written out, and against everybody else's on the same features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics import mmd
from diffaccel.eval.statistics.mmd import (
    cmmd,
    cmmd_unbiased,
    cmmd_unbiased_replicates,
    kid,
    kid_full,
    kid_full_replicates,
)
from diffaccel.eval.statistics.moments import Array


def sample(n: int, seed: int, shift: float = 0.0, d: int = 24) -> Array:
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


X, Y = sample(90, 1), sample(70, 2, shift=0.3)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmd, "BLOCK", 32)  # so that 90 samples are several, the last one ragged


def cubic(a: Array, b: Array) -> Array:
    return (a @ b.T / a.shape[1] + 1) ** 3


def unbiased(kernel: Callable[[Array, Array], Array], x: Array, y: Array) -> float:
    n, m, xx, yy = len(x), len(y), kernel(x, x), kernel(y, y)
    own = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return own - 2 * kernel(x, y).mean()


def test_kid_of_all_pairs_is_its_formula() -> None:
    assert kid_full(X, Y) == pytest.approx(unbiased(cubic, X, Y), rel=1e-10)
    assert kid_full(Y, X) == pytest.approx(kid_full(X, Y), rel=1e-10)
    assert kid_full(X[::-1], Y) == pytest.approx(kid_full(X, Y), rel=1e-10)


def test_kid_takes_the_subsets_that_its_docstring_says() -> None:
    result, rng, values = kid(X, Y, subsets=5, subset_size=40, seed=3), np.random.default_rng(3), []
    for _ in range(5):
        x = X[rng.choice(90, 40, replace=False)]
        values.append(unbiased(cubic, x, Y[rng.choice(70, 40, replace=False)]))
    assert (result.value, result.std) == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)
    assert (result.subsets, result.subset_size, result.seed) == (5, 40, 3)


def test_kid_repeats_and_leaves_the_global_generator_alone() -> None:
    state = np.random.get_state()[1].copy()
    assert kid(X, Y, 5, 40) == kid(X, Y, 5, 40)
    assert kid(X, Y, 5, 40, seed=1).value != kid(X, Y, 5, 40).value
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_kid_agrees_with_torchmetrics_on_the_same_subsets() -> None:
    theirs = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    rng, values = np.random.default_rng(0), []
    for _ in range(4):
        x, y = (torch.from_numpy(side[rng.choice(len(side), 50, replace=False)]) for side in (X, Y))
        values.append(float(theirs(x, y)))
    assert kid(X, Y, 4, 50).value == pytest.approx(np.mean(values), rel=1e-6)


def test_kid_agrees_with_clean_fid_and_torch_fidelity_where_nothing_is_drawn() -> None:
    distance = pytest.importorskip("cleanfid.fid").kernel_distance
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    ours = kid(X[:70], Y, 1, 70).value
    assert ours == pytest.approx(distance(X[:70], Y, num_subsets=1), rel=1e-6)
    kernels = fidelity.kernel_mmd(
        X[:70], Y, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0
    )
    assert ours == pytest.approx(kernels, rel=1e-6)
    assert ours == pytest.approx(kid_full(X[:70], Y), rel=1e-9)  # all of both sides is the one subset


def test_clean_fid_shrinks_the_subsets_that_we_refuse() -> None:
    distance = pytest.importorskip("cleanfid.fid").kernel_distance
    assert np.isfinite(distance(X, Y, num_subsets=1, max_subset_size=1000))
    with pytest.raises(DataError, match="subsets of 1000 needs as many pictures on each side, not 90 and 70"):
        kid(X, Y)


def test_kid_of_one_distribution_is_about_zero() -> None:
    values = [kid_full(sample(100, 2 * i), sample(100, 2 * i + 1)) for i in range(20)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(20)
    assert min(values) < 0  # no bias, and no clamp


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def published_cmmd(x: Array, y: Array) -> float:
    """The formula of google-research/cmmd on vectors of length 1."""

    def kernel(a: Array, b: Array) -> Array:
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return np.exp(-squares / (2 * 10**2))

    x, y = unit(x), unit(y)
    return 1000 * (kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())


def test_cmmd_is_the_published_formula() -> None:
    assert cmmd(X, Y) == pytest.approx(published_cmmd(X, Y), abs=1e-9)
    assert cmmd(7 * X, Y) == pytest.approx(cmmd(X, Y), rel=1e-12)  # lengths do not count
    assert cmmd(X, X) == pytest.approx(0, abs=1e-10)


def test_cmmd_is_nearly_the_distance_of_the_means() -> None:
    x, y = sample(300, 1, 0.2), sample(300, 2, -0.2)
    assert cmmd(x, y) == pytest.approx(10 * ((unit(x).mean(0) - unit(y).mean(0)) ** 2).sum(), rel=0.02)


def test_bias_of_cmmd() -> None:
    pairs = [(sample(200, 2 * i), sample(200, 2 * i + 1)) for i in range(10)]
    biased, corrected = ([measure(x, y) for x, y in pairs] for measure in (cmmd, cmmd_unbiased))
    assert np.mean(biased) > 10 * abs(np.mean(corrected))
    x, y = unit(X), unit(Y)
    assert cmmd_unbiased(X, Y) == pytest.approx(
        1000 * unbiased(lambda a, b: np.exp((a @ b.T - 1) / 100), x, y), abs=1e-9
    )


@pytest.mark.parametrize(
    ("measure", "fast"), [(kid_full, kid_full_replicates), (cmmd_unbiased, cmmd_unbiased_replicates)]
)
def test_replicates_leave_each_group_out(measure: Callable[..., float], fast: Callable[..., object]) -> None:
    groups = [X[:20], X[20:55], X[55:]]
    result = fast(groups, Y)
    assert result.sizes == (20, 35, 35)
    assert result.value == pytest.approx(measure(X, Y), rel=1e-10)
    expected = [measure(np.concatenate(groups[:i] + groups[i + 1 :]), Y) for i in range(3)]
    assert result.left_out == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("measure", [kid_full, kid, cmmd, cmmd_unbiased])
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.ones((9, 3)), "3 and 24 features"),
        (np.ones((1, 24)), "at least 2 pictures"),
        (np.full((9, 24), np.nan), "finite"),
        (np.ones(24), r"\(N, d\)"),
    ],
)
def test_bad_features_are_refused(measure: Callable[..., object], x: Array, match: str) -> None:
    with pytest.raises(DataError, match=match):
        measure(x, Y)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="row 4 of the features is 0"):
        cmmd(np.where(np.arange(9)[:, None] == 4, 0.0, 1.0) * np.ones((9, 24)), Y)
    with pytest.raises(ValueError, match="subset_size >= 2"):
        kid(X, Y, subset_size=1)
    with pytest.raises(DataError, match="at least 2 groups"):
        kid_full_replicates([X], Y)
    with pytest.raises(DataError, match="also without a group"):
        kid_full_replicates([X, X[:1]], Y)
    with pytest.raises(DataError, match="5 and 24 features"):
        kid_full_replicates([X, X[:, :5]], Y)
