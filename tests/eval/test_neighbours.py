"""Precision, recall, density and coverage against the `prdc` package, and by hand where samples tie."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from diffaccel.eval.errors import DataError
from diffaccel.eval.statistics.moments import Array
from diffaccel.eval.statistics.neighbours import Neighbours, neighbours


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # diffaccel.eval has the function under the module's name
    module = importlib.import_module("diffaccel.eval.statistics.neighbours")
    monkeypatch.setattr(module, "BLOCK", 32)


def sample(n: int, seed: int, scale: float = 1.0, d: int = 6) -> Array:
    return scale * np.random.default_rng(seed).standard_normal((n, d))


def numbers(result: Neighbours) -> tuple[float, float, float, float]:
    return result.precision, result.recall, result.density, result.coverage


@pytest.mark.parametrize("k", [3, 5])
def test_numbers_of_prdc(k: int, capsys: pytest.CaptureFixture[str]) -> None:
    compute = pytest.importorskip("prdc").compute_prdc
    x, y = sample(90, 1, 0.8), sample(110, 2)
    theirs = compute(y, x, nearest_k=k)
    expected = [theirs[name] for name in ("precision", "recall", "density", "coverage")]
    # samples drawn from a density do not tie, so that < and <= are the same
    assert numbers(neighbours(x, y, precision_k=k, density_k=k)) == pytest.approx(expected, abs=1e-12)
    assert 0 < theirs["coverage"] < 1


def test_each_pair_of_numbers_has_its_own_k() -> None:
    x, y = sample(90, 1, 0.8), sample(110, 2)
    both, three, five = neighbours(x, y), neighbours(x, y, density_k=3), neighbours(x, y, precision_k=5)
    assert numbers(both)[:2] == numbers(three)[:2] != numbers(five)[:2]
    assert numbers(both)[2:] == numbers(five)[2:] != numbers(three)[2:]
    assert both.convention == (
        "precision and recall: k = 3, <=; density and coverage: k = 5, <; 90 generated, 110 reference"
    )


def test_balls_are_closed_for_precision_and_open_for_density() -> None:
    reference = np.array([[0.0], [2.0], [10.0], [14.0]])  # radii 2, 2, 4, 4 at k = 1
    generated = np.array([[-2.0], [6.0], [100.0]])  # on the edge of a ball; between two edges; far away
    result = neighbours(generated, reference, precision_k=1, density_k=1)
    # radii of the generated: 8, 8, 94 -> closed balls around -2, 6 and 100 reach 0, 2; 2 to 14; 10 and 14
    assert numbers(result) == (2 / 3, 1.0, 0.0, 0.0)
    moved = neighbours(generated + np.array([[1e-6], [1e-6], [0]]), reference, precision_k=1, density_k=1)
    assert numbers(moved) == (2 / 3, 1.0, 2 / 3, 1 / 2)  # in 0's ball; in those of 10 and, still, none of 2


def test_balls_are_closed_for_recall() -> None:
    generated, reference = np.array([[0.0], [1.0]]), np.array([[-1.0], [5.0], [6.0]])
    assert numbers(neighbours(generated, reference, 1, 1))[:2] == (1.0, 1 / 3)  # -1 on the edge of 0's ball


def test_a_set_against_itself() -> None:
    x = sample(100, 1) + 50  # far from 0, where the squares lose digits
    # every ball holds its own sample and k - 1 neighbours; rounding must not let the k-th in
    assert numbers(neighbours(x, x)) == (1.0, 1.0, 1.0, 1.0)


def test_offsets_and_order_do_not_count() -> None:
    x, y = 1e-2 * sample(90, 1, 0.8), 1e-2 * sample(110, 2)
    expected = numbers(neighbours(x, y))
    assert numbers(neighbours(x + 1e5, y + 1e5)) == expected
    shuffled = neighbours(np.random.default_rng(0).permutation(x), np.random.default_rng(1).permutation(y))
    assert numbers(shuffled) == expected


def test_a_generator_that_has_collapsed() -> None:
    y = sample(60, 2, d=37)
    for i in range(20):
        onto_one = numbers(neighbours(np.repeat(y[i : i + 1], 40, axis=0), y))
        assert onto_one[:2] == (1.0, 1 / 60)  # balls of radius 0 hold that one reference sample
        assert onto_one[3] < 0.5
    assert numbers(neighbours(np.full((40, 37), 1e3), y)) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.ones((9, 3)), "3 and 6 features"),
        (np.ones((5, 6)), "more samples than that"),
        (np.full((9, 6), np.inf), "generated features must be finite"),
        (np.ones(6), r"\(N, d\)"),
    ],
)
def test_bad_features_are_refused(x: Array, match: str) -> None:
    with pytest.raises(DataError, match=match):
        neighbours(x, sample(20, 1))


def test_k_counts_neighbours() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0 and 5"):
        neighbours(sample(20, 1), sample(20, 2), precision_k=0)
