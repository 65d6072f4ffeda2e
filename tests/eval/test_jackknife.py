"""The jackknife against textbook formulas, and against what fresh draws do."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.frechet import frechet, gaussian
from diffaccel.eval.statistics.jackknife import Replicates, grouped, jackknife, jackknife_difference, replicates
from diffaccel.eval.statistics.moments import Array, Moments, merge_all

D, N = 8, 400
REFERENCE = gaussian(Moments(10**9, np.zeros(D), np.eye(D) * (10**9 - 1)))
TRUTH = D * 0.2**2  # squared distance of N(0, 1.2^2) and N(0, 1)


def draws(seed: int) -> Array:
    return 1.2 * np.random.default_rng(seed).standard_normal((N, D))


def moments_of_groups(x: Array, count: int = 20) -> list[Moments]:
    return [Moments.of(part) for part in np.array_split(x, count)]


def to_reference(moments: Moments) -> float:
    return frechet(moments, REFERENCE)


def mean(x: Array) -> float:
    return float(x.mean())


def test_one_by_one_the_mean_has_its_textbook_error() -> None:
    x = np.random.default_rng(0).standard_normal(30)
    estimate = jackknife(mean, list(x[:, None]))
    assert estimate.value == pytest.approx(x.mean())
    assert estimate.se == pytest.approx(x.std(ddof=1) / math.sqrt(30))
    assert estimate.corrected == pytest.approx(x.mean())
    assert estimate.n == 30


def test_one_by_one_the_bias_of_a_variance_is_removed_exactly() -> None:
    x = np.random.default_rng(0).standard_normal(33)
    assert jackknife(lambda part: float(part.var()), list(x[:, None])).corrected == pytest.approx(x.var(ddof=1))


@pytest.mark.parametrize("sizes", [(10, 10, 10), (3, 7, 23), (1, 99)])
def test_a_bias_of_order_one_over_n_is_removed_whatever_the_sizes(sizes: tuple[int, ...]) -> None:
    groups = [np.zeros(size) for size in sizes]
    assert jackknife(lambda x: 3 + 7 / len(x), groups).corrected == pytest.approx(3.0)


def test_equal_groups_are_the_ordinary_jackknife() -> None:
    x = np.random.default_rng(0).standard_normal((60, 3))
    groups, count = np.array_split(x, 5), 5
    left_out = np.array([np.concatenate(groups[:i] + groups[i + 1 :]).std() for i in range(count)])
    estimate = jackknife(lambda part: float(part.std()), groups)
    assert estimate.corrected == pytest.approx(count * x.std() - (count - 1) * left_out.mean())
    assert estimate.se == pytest.approx(math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))


def test_unequal_groups_are_weighted() -> None:
    rng = np.random.default_rng(0)
    sizes = [5, 40, 20, 35] * 5
    errors = [jackknife(mean, [rng.standard_normal(size) for size in sizes]).se for _ in range(200)]
    assert np.mean(errors) == pytest.approx(1 / math.sqrt(sum(sizes)), rel=0.05)


@pytest.mark.parametrize("count", [2, 3, 7, 20])
def test_moments_without_a_group_are_those_of_the_others(count: int) -> None:
    x = draws(0)
    parts = np.array_split(x, count)
    result = replicates(to_reference, [Moments.of(part) for part in parts])
    expected = [frechet(np.concatenate(parts[:i] + parts[i + 1 :]), REFERENCE) for i in range(count)]
    assert result.left_out == pytest.approx(expected, rel=1e-10)
    assert result.value == pytest.approx(frechet(x, REFERENCE), rel=1e-10)
    assert result.sizes == tuple(len(part) for part in parts)


def test_arrays_without_a_group_keep_their_order() -> None:
    seen: list[list[float]] = []
    replicates(lambda x: seen.append(x.tolist()) or 0.0, [np.array([i, i + 0.5]) for i in range(5)])
    everything = [i / 2 for i in range(10)]
    assert seen == [everything[: 2 * i] + everything[2 * i + 2 :] for i in range(5)] + [everything]


def test_the_same_groups_give_the_same_bits() -> None:
    one, two = (jackknife(to_reference, moments_of_groups(draws(0))) for _ in range(2))
    assert one == two


def test_standard_error_and_correction_hold_for_fresh_draws() -> None:
    estimates = [jackknife(to_reference, moments_of_groups(draws(seed))) for seed in range(100)]
    values, corrected, errors = (
        np.array([getattr(e, name) for e in estimates]) for name in ("value", "corrected", "se")
    )
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.2)
    noise = values.std() / math.sqrt(len(values))
    assert values.mean() - TRUTH > 5 * noise  # too large, as FID of few pictures is
    assert abs(corrected.mean() - TRUTH) < 3 * noise
    covered = np.abs(corrected - TRUTH) <= 2.09 * errors
    assert covered.mean() > 0.85


def test_error_of_a_difference_with_shared_noise() -> None:
    def difference(seed: int) -> object:
        x = draws(seed)
        return jackknife_difference(to_reference, moments_of_groups(1.02 * x), moments_of_groups(x))

    estimates = [difference(seed) for seed in range(60)]
    values, errors = (np.array([getattr(e, name) for e in estimates]) for name in ("value", "se"))
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.25)
    alone = jackknife(to_reference, moments_of_groups(draws(0))).se
    assert alone is not None
    assert np.mean(errors) < alone / 5


def test_replicates_of_several_runs_are_measured_once() -> None:
    base, fast = moments_of_groups(draws(0)), moments_of_groups(1.1 * draws(0))
    both = replicates(to_reference, fast) - replicates(to_reference, base)
    assert both.estimate() == jackknife_difference(to_reference, fast, base)
    assert (both - both).estimate().se == 0


def test_shards_are_grouped_evenly_and_in_order() -> None:
    x = draws(0)
    shards = [Moments.of(x[i : i + 9]) for i in range(0, N, 9)]  # 45 of them, the last one smaller
    groups = grouped(shards)
    assert len(groups) == 20
    assert {round(group.n / 9) for group in groups} == {2, 3}
    np.testing.assert_allclose(merge_all(groups).m2, merge_all(shards).m2, rtol=1e-10, atol=1e-10)
    assert [len(group) for group in grouped(list(np.split(x, 5)))] == [80] * 5
    np.testing.assert_array_equal(np.concatenate(grouped(np.split(x, 40), 3)), x)


def test_bad_groups_are_refused() -> None:
    groups = moments_of_groups(draws(0))
    with pytest.raises(DataError, match="at least 2 groups"):
        jackknife(to_reference, groups[:1])
    with pytest.raises(DataError, match="there are none"):
        jackknife(to_reference, [])
    with pytest.raises(DataError, match="one is empty"):
        jackknife(mean, [np.ones(2), np.ones(0)])
    with pytest.raises(DataError, match="same prompts and seeds"):
        jackknife_difference(to_reference, groups, groups[:10])
    with pytest.raises(DataError, match="no shards"):
        grouped([])
    with pytest.raises(ValueError, match="at least 2 groups, not 1"):
        grouped(groups, 1)
    with pytest.raises(DataError, match="one number for each"):
        Replicates(1.0, (1.0,), (2, 3))


def test_any_measure_with_a_bound_reference() -> None:
    estimate = jackknife(partial(frechet, y=REFERENCE), grouped([Moments.of(part) for part in np.split(draws(0), 40)]))
    assert estimate.n == N
    assert estimate.se is not None
    assert estimate.se > 0
