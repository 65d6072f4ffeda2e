"""What the solver benchmark measured, and the statistics made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from diffusers_candidates import Candidate
from dry_run import Trace
from our_candidates import Ours

from diffaccel.eval import Interval, paired_interval

SHARE = 0.01  # N and 2N steps of the reference agree to this share of the smallest error reported


@dataclass(frozen=True)
class Screened:
    """A candidate on the screening prompts.

    Attributes:
        candidate: the candidate.
        trace: what it does on the toy network.
        same: labels of candidates that are the same method.
        mse: latent MSE of each pair.
        mse_against: the same to further references, of the first pairs only.
    """

    candidate: Candidate | Ours
    trace: Trace
    same: list[str]
    mse: tuple[float, ...] = ()
    mse_against: tuple[tuple[float, ...], ...] = ()

    def with_pairs(self, scores: Mapping[str, Any]) -> Screened:
        """With the pairs of `Worker.score`'s answer added."""
        before, added = self.mse_against, scores["mse_against"]
        against = tuple((*a, *b) for a, b in zip(before or [()] * len(added), added, strict=False)) if added else before
        return replace(self, mse=(*self.mse, *scores["mse"]), mse_against=against)

    @property
    def error(self) -> float:
        """Geometric mean of the latent MSE: of few pairs, all count."""
        return geometric_mean(self.mse)


@dataclass(frozen=True)
class Entry:
    """A finalist on the held-out prompts: measures of each pair."""

    label: str
    calls: int
    screening_error: float
    mse: list[float]
    psnr: list[float]
    clip: list[float] | None


@dataclass(frozen=True)
class Question:
    """Two runs on one grid: latent MSE of each pair, and the reference's own error."""

    title: str
    grid: str
    calls: int
    a: list[float]
    b: list[float]
    pairs: list[tuple[str, int]]
    errors: list[float]


@dataclass(frozen=True)
class Results:
    """All that the benchmark measured; see `solver_tables.Bench`."""

    header: dict[str, Any]
    pairs: tuple[tuple[str, int], ...]
    reference_errors: list[float]
    checks: list[list[float]]
    screened: dict[str, dict[int, list[Screened]]]
    failures: dict[str, list[str]]
    same_grid: list[tuple[str, int, Entry, Entry]]
    best: dict[str, dict[int, list[Entry]]]
    questions: list[Question]

    def converged(self) -> np.ndarray:
        """(N,) bool: pairs whose reference is exact enough for the smallest error of tables A and B."""
        entries = [e for row in self.same_grid for e in row[2:]]
        entries += [e for side in self.best.values() for found in side.values() for e in found]
        smallest = min(float(np.median(e.mse)) for e in entries)
        return np.asarray(self.reference_errors) <= SHARE * smallest


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean; 0 if a value is."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(np.asarray(values)).mean()))


def median(values: list[float], kept: np.ndarray) -> float:
    """Median over the kept pairs; NaN if none is."""
    return float(np.median(np.asarray(values)[kept])) if kept.any() else float("nan")


def ratio(results: Results, kept: np.ndarray, ours: Entry, theirs: Entry) -> Interval | None:
    """Latent MSE of ours over theirs, pair by pair; None if fewer than two prompts are left."""
    return _interval(ours.mse, theirs.mse, results.pairs, kept)


def answers(results: Results) -> list[tuple[Question, np.ndarray, Interval | None]]:
    """Each question with the pairs kept, judged by the smaller error of its own row, and the ratio of its two runs."""
    found = []
    for q in results.questions:
        kept = np.asarray(q.errors) <= SHARE * min(float(np.median(q.a)), float(np.median(q.b)))
        found.append((q, kept, _interval(q.a, q.b, q.pairs, kept)))
    return found


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation."""
    ranks_a, ranks_b = (np.argsort(np.argsort(values)) for values in (a, b))
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1]) if len(a) > 1 else 1.0


def _interval(a: list[float], b: list[float], pairs: Sequence[tuple[str, int]], kept: np.ndarray) -> Interval | None:
    prompts = [prompt for (prompt, _), keep in zip(pairs, kept, strict=True) if keep]
    return paired_interval(np.asarray(a)[kept], np.asarray(b)[kept], prompts) if len(set(prompts)) > 1 else None
