"""The Frechet distance against closed forms, and against everybody else's on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.frechet import frechet, gaussian
from diffaccel.eval.statistics.moments import Array, Moments, merge_all

HUGE = 10**9  # pictures of a population, where n must not matter


def population(mean: Array, covariance: Array) -> Moments:
    return Moments(HUGE, np.asarray(mean, dtype=float), np.asarray(covariance, dtype=float) * (HUGE - 1))


def orthogonal(d: int, seed: int = 0) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def positive(d: int, seed: int = 7) -> Array:
    """A symmetric matrix with eigenvalues from 0.5 to 1.5."""
    q = orthogonal(d, seed)
    return (q * np.linspace(0.5, 1.5, d)) @ q.T


def sample(n: int, d: int, seed: int) -> Array:
    """Features of a decaying spectrum, as networks give them, with a mean."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) * np.geomspace(1, 0.03, d) @ orthogonal(d, seed) + 0.1 * rng.standard_normal(d)


def test_isotropic_gaussians() -> None:
    d = 4
    # |1, 1, 1, 1|^2 + 4 (2 - 1)^2
    assert frechet(population(np.zeros(d), np.eye(d)), population(np.ones(d), 4 * np.eye(d))) == pytest.approx(8.0)


def test_zero_covariance_leaves_the_mean_and_a_trace() -> None:
    a = population(np.zeros(4), np.zeros((4, 4)))
    assert frechet(a, population(2 * np.ones(4), np.eye(4))) == pytest.approx(20.0)
    assert frechet(a, a) == 0
    assert frechet(np.ones((3, 4)), 3 * np.ones((5, 4))) == pytest.approx(16.0)


def test_commuting_covariances() -> None:
    q, a, b = orthogonal(16), np.geomspace(1, 1e-6, 16), np.geomspace(1e-3, 5, 16)
    value = frechet(population(np.zeros(16), (q * a) @ q.T), population(np.zeros(16), (q * b) @ q.T))
    assert value == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e11])
def test_covariances_that_do_not_commute(condition: float) -> None:
    # S2 = M S1 M has tr (S1 S2)^(1/2) = tr M S1, so that the distance is |(1 - M) F1|^2
    d = 64
    factor, m = orthogonal(d) * np.sqrt(np.geomspace(1, 1 / condition, d)), positive(d)
    one, two = factor @ factor.T, (m @ factor) @ (m @ factor).T
    expected = (((np.eye(d) - m) @ factor) ** 2).sum()
    assert frechet(population(np.zeros(d), one), population(np.zeros(d), two)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("n", [12, 33, 64])
def test_fewer_pictures_than_features(n: int) -> None:
    d = 64
    x, m = sample(n, d, 1), positive(d)
    centred = x - x.mean(0)
    expected = (((centred @ (np.eye(d) - m)) ** 2).sum()) / (n - 1)
    y = centred @ m + x.mean(0)
    assert frechet(x, y) == pytest.approx(expected, abs=1e-12)
    # the moments alone: what the features' rounding left in the null space must not count
    assert frechet(Moments.of(x), Moments.of(y)) == pytest.approx(expected, abs=1e-11)
    assert frechet(x, Moments.of(y)) == pytest.approx(expected, abs=1e-11)


def test_few_pictures_are_their_own_factor() -> None:
    n, d = 30, 64
    stds = np.geomspace(1, 1e-8, d)
    x, stretch = sample(n, d, 1) @ orthogonal(d, 4) * stds, 1 / stds
    x -= x.mean(0)
    assert gaussian(x).factor.shape == (d, n)
    # S2 = M S1 M with M = diag(stretch): the variances of 1e-16 count, and any covariance would have lost them
    expected = ((x * (1 - stretch)) ** 2).sum() / (n - 1)
    assert frechet(x, x * stretch) == pytest.approx(expected, rel=1e-13)


def test_a_covariance_stored_in_float32_has_the_rank_of_its_pictures() -> None:
    n, d = 20, 64
    x, y = sample(n, d, 1), sample(500, d, 2)
    moments = Moments.of(x)
    rounded = Moments(n, moments.mean, moments.m2.astype(np.float32).astype(np.float64))
    assert frechet(rounded, y) == pytest.approx(frechet(x, y), abs=1e-6)  # 1e-3 off with the noise of 44 directions


def test_covariances_that_cholesky_takes_for_regular() -> None:
    d, other = 12, population(np.zeros(12), np.eye(12))
    for seed in range(30):
        # singular, but where rounding leaves the last pivot positive, Cholesky does not notice
        factor = np.random.default_rng(seed).standard_normal((d, d - 1))
        expected = (factor**2).sum() + d - 2 * np.linalg.svd(factor, compute_uv=False).sum()
        assert frechet(population(np.zeros(d), factor @ factor.T), other) == pytest.approx(expected, abs=1e-10)


def test_dead_features_do_not_count() -> None:
    x, y = sample(300, 8, 1), sample(300, 8, 2)
    wide_x, wide_y = (np.hstack([part, np.zeros((300, 3)), part[:, :1]]) for part in (x, y))
    assert frechet(wide_x, wide_x) == pytest.approx(0, abs=1e-10)
    expected = frechet(x, y)
    dead_x, dead_y = (np.hstack([part, np.full((300, 3), 0.7)]) for part in (x, y))
    assert frechet(dead_x, dead_y) == pytest.approx(expected, abs=1e-10)
    assert frechet(wide_y, wide_x) > expected


@pytest.mark.parametrize(("n", "m"), [(400, 300), (20, 25), (20, 300)])
def test_metric_properties(n: int, m: int) -> None:
    d = 32
    x, y = sample(n, d, 1), sample(m, d, 2)
    value, q = frechet(x, y), orthogonal(d, 3)
    assert value > 0.1
    assert frechet(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet(Moments.of(x), x) == pytest.approx(0, abs=1e-10)
    assert frechet(y, x) == pytest.approx(value, rel=1e-12)
    assert frechet(x @ q, y @ q) == pytest.approx(value, rel=1e-11)
    assert frechet(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-12)
    assert frechet(x + 5, y + 5) == pytest.approx(value, rel=1e-11)
    assert frechet(np.random.default_rng(0).permutation(x), y) == pytest.approx(value, rel=1e-12)


def test_features_moments_and_gaussians_are_the_same() -> None:
    x, y = sample(200, 16, 1), sample(300, 16, 2)
    shards = merge_all([Moments.of(part) for part in np.array_split(x, 7)])
    value = frechet(x, y)
    assert frechet(shards, gaussian(y)) == pytest.approx(value, rel=1e-12)
    assert frechet(torch.from_numpy(x), Moments.of(y)) == value
    assert frechet(gaussian(x), gaussian(Moments.of(y))) == value


def test_large_offsets_keep_their_digits() -> None:
    x, y = 1e-2 * sample(500, 16, 1), 1e-2 * sample(500, 16, 2)
    assert frechet(1e3 + x, 1e3 + y) == pytest.approx(frechet(x, y), rel=1e-8)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.ones((5, 3)), "3 and 4 features"),
        (np.ones((1, 4)), "at least 2 pictures"),
        (Moments.of(np.ones((1, 4))), "at least 2 pictures"),
        (np.full((5, 4), np.nan), "finite"),
        (np.ones(4), r"\(N, d\)"),
        (Moments(9, np.zeros(4), np.diag([1.0, 1.0, 1.0, -1.0])), "no covariance"),
        (Moments(3, np.zeros(4), np.eye(4)), "no covariance of so few"),
    ],
)
def test_bad_input_is_refused(x: Array, match: str) -> None:
    with pytest.raises(DataError, match=match):
        frechet(x, np.eye(4))


@pytest.fixture
def pair() -> tuple[Array, Array]:
    return sample(400, 48, 1), 1.1 * sample(350, 48, 2)


def test_parity_with_clean_fid(pair: tuple[Array, Array]) -> None:
    scipy = pytest.importorskip("scipy")
    if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18):
        pytest.skip("clean-fid 0.1.35 fails on SciPy 1.18")
    fid = pytest.importorskip("cleanfid.fid")
    assert frechet(*pair) == pytest.approx(fid.fid_from_feats(*pair), rel=1e-6)


def test_parity_with_pytorch_fid(pair: tuple[Array, Array]) -> None:
    scipy = pytest.importorskip("scipy")
    if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18):
        pytest.skip("pytorch-fid 0.3.0 fails on SciPy 1.18")
    score = pytest.importorskip("pytorch_fid.fid_score")
    stats = [statistic for x in pair for statistic in (x.mean(0), np.cov(x, rowvar=False))]
    assert frechet(*pair) == pytest.approx(float(score.calculate_frechet_distance(*stats)), rel=1e-6)


def test_parity_with_torch_fidelity(pair: tuple[Array, Array]) -> None:
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    stats = [metric.fid_features_to_statistics(torch.from_numpy(x)) for x in pair]
    theirs = metric.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet(*pair) == pytest.approx(theirs, rel=1e-6)


def test_parity_with_torchmetrics(pair: tuple[Array, Array]) -> None:
    image = pytest.importorskip("torchmetrics.image.fid")
    identity = torch.nn.Identity()
    identity.num_features = 48
    metric = image.FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    for x, real in zip(pair, (True, False), strict=True):
        metric.update(torch.from_numpy(x), real=real)
    assert frechet(*pair) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_what_is_wrong_with_eigenvalues_of_the_product() -> None:
    """The oracles lose digits where we do not: at a condition of 1e11 they are not what we are measured by."""
    d = 64
    factor, m = orthogonal(d) * np.sqrt(np.geomspace(1, 1e-11, d)), positive(d)
    one, two = factor @ factor.T, (m @ factor) @ (m @ factor).T
    expected = (((np.eye(d) - m) @ factor) ** 2).sum()
    theirs = np.trace(one + two) - 2 * np.sqrt(np.linalg.eigvals(one @ two).astype(complex)).real.sum()
    assert (
        abs(theirs - expected)
        > 1e-9
        > 10 * abs(frechet(population(np.zeros(d), one), population(np.zeros(d), two)) - expected)
    )
