"""Evolution of samplers: mutation, crossover, a predictor that chooses offspring, and halving of those that are run.

Shared by `usf` and `autodiffusion`, which say what a genome is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.search.ledger import BudgetError, Ledger, Space, summary
from diffaccel.samplers.search.surrogate import Surrogate, rank_correlation

G = TypeVar("G")
POPULATION = 15  # parents: `rank_bar` of the USF code
OFFSPRING = 24  # run in each generation, of CANDIDATES times as many
CANDIDATES = 8
EXPLORED = 0.2  # share of the offspring that the predictor has no say in
DULL = 5  # generations without a new genome that end a search: small spaces are exhausted


@dataclass
class Evolved(Generic[G]):
    """How a search went.

    Attributes:
        best: genomes that were run on all pairs, best first.
        origin: the best of those it started from.
        tried: genomes that were run.
        history: (evaluations, mean error) whenever there was a better one, for plots.
        predicted: rank correlation of the predictor with what its choices then gave, a number a generation.
    """

    best: list[G]
    origin: G
    tried: int
    history: list[tuple[float, float]] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)


def evolve(
    space: Space[G],
    starts: Sequence[G],
    ledger: Ledger[G],
    rng: np.random.Generator,
    *,
    crossover: float,
) -> Evolved[G]:
    """Breed from `starts` until the ledger's budget is spent or nothing new is found.

    In each generation children of the best are ranked by a predictor that was trained on all runs so far; the promising
    ones are run on a few pairs, the better third of them on more, and so on. A genome that is worse than the best by
    two standard errors of their paired difference is run no further.

    Raises:
        ValueError: for a budget that does not suffice for the starts.
    """
    seen: dict[str, G] = {}
    full: list[G] = []  # run on all pairs, best first
    history: list[tuple[float, float]] = []
    correlations: list[float] = []
    rungs = _rungs(ledger.pairs)

    def mean(genome: G, count: int) -> float:
        return float(ledger.errors(genome, count).mean())

    def race(genomes: Sequence[G], keep: float) -> None:
        alive = list(genomes)
        for rung in rungs:
            for genome in alive:
                seen.setdefault(space.key(genome), genome)
                ledger.errors(genome, rung)
                if rung == ledger.pairs and genome not in full:
                    full.append(genome)
                    full.sort(key=lambda g: mean(g, rung))
                    if full[0] == genome:
                        history.append((round(ledger.spent, 3), mean(genome, rung)))
            alive.sort(key=lambda g: mean(g, rung))
            alive = alive[: max(1, math.ceil(len(alive) * keep))]
            if full:
                alive = [g for g in alive if not _clearly_worse(ledger.errors(g, rung), ledger.errors(full[0], rung))]

    try:
        race(_distinct(space, starts, {}), 0.5)
    except BudgetError:
        raise ValueError(
            f"{ledger.evaluations:g} evaluations do not suffice for the {len(starts)} samplers that the search starts "
            "from; give some hundred"
        ) from None
    finally:
        ledger.save()
    origin, dull = full[0], 0
    try:
        while dull < DULL:
            children = _children(space, full[:POPULATION], seen, rng, crossover)
            dull = 0 if children else dull + 1
            guess = _predict(space, ledger, seen, origin, children)
            chosen = _choose(guess, rng)
            race([children[i] for i in chosen], 1 / 3)
            if len(chosen) > 3:
                base = ledger.errors(origin, rungs[0]).mean()
                found = [math.log(max(mean(children[i], rungs[0]), 1e-300) / base) for i in chosen]
                correlations.append(rank_correlation(guess[chosen], np.array(found)))
    except BudgetError:
        pass
    finally:
        ledger.save()
    return Evolved(full, origin, len(seen), history, correlations)


def _rungs(pairs: int) -> list[int]:
    """Pairs of each round of halving."""
    return sorted({max(min(pairs, 4), pairs // 6), max(min(pairs, 4), pairs // 2), pairs})


def _clearly_worse(errors: FloatArray, best: FloatArray) -> bool:
    gap = errors - best
    spread = gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else math.inf
    return bool(gap.mean() > 2 * spread)


def _distinct(space: Space[G], genomes: Iterable[G], seen: dict[str, G]) -> list[G]:
    """Those that are new, each once."""
    return list({key: g for g in genomes if (key := space.key(g)) not in seen}.values())


def _children(
    space: Space[G], parents: Sequence[G], seen: dict[str, G], rng: np.random.Generator, crossover: float
) -> list[G]:
    def child() -> G:
        # Better parents have more children: ranks are drawn from a triangle.
        first, second = (parents[int(len(parents) * (1 - math.sqrt(1 - rng.random())))] for _ in range(2))
        mixed = len(parents) > 1 and rng.random() < crossover
        return space.mutate(space.cross(first, second, rng), rng) if mixed else space.mutate(first, rng)

    return _distinct(space, (child() for _ in range(OFFSPRING * CANDIDATES)), seen)


def _predict(space: Space[G], ledger: Ledger[G], seen: dict[str, G], origin: G, children: Sequence[G]) -> FloatArray:
    """Guessed log error of the children, relative to `origin`."""
    known, targets = [], []
    for genome in list(seen.values()):
        count = ledger.count(genome)
        if count:
            base = ledger.errors(origin, count).mean()  # on the same pairs
            known.append(space.features(genome))
            targets.append(math.log(max(float(ledger.errors(genome, count).mean()), 1e-300) / base))
    if not children:
        return np.zeros(0)
    return Surrogate.fit(np.stack(known), np.array(targets))(np.stack([space.features(g) for g in children]))


def _choose(guess: FloatArray, rng: np.random.Generator) -> list[int]:
    """The most promising children, and some others."""
    ranked = [int(i) for i in np.argsort(guess, kind="stable")]
    sure = ranked[: round(OFFSPRING * (1 - EXPLORED))]
    rest = ranked[len(sure) :]
    return sure + [int(i) for i in rng.permutation(rest)[: OFFSPRING - len(sure)]]


def split_pairs(count: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Pairs that select, and a quarter that only judges the winner; of fewer than 8 all select."""
    order = [int(i) for i in rng.permutation(count)]
    held = count // 4 if count >= 8 else 0
    return order[held:], order[:held]


def judged(space: Space[G], evolved: Evolved[G], ledger: Ledger[G], held: Sequence[int]) -> tuple[G, dict[str, Any]]:
    """The winner, or where it started from if the pairs that had no say prefer that; and what is known of both."""
    winner, origin = evolved.best[0], evolved.origin
    both = {"found": winner, "start": origin}
    notes: dict[str, Any] = {
        "selected_on": {name: summary(ledger.errors(g, ledger.pairs)) for name, g in both.items()},
        "evaluations": round(ledger.spent, 2),
        "evaluations_now": round(ledger.run, 2),
        "genomes": evolved.tried,
        "history": [list(point) for point in evolved.history],
        "predictor_rank_correlation": [round(v, 3) for v in evolved.predicted],
    }
    if held and space.key(winner) != space.key(origin):
        fresh = {name: space.score(g, held) for name, g in both.items()}
        gap = fresh["found"] - fresh["start"]
        notes["held_out"] = {name: summary(v) for name, v in fresh.items()} | {"difference": summary(gap)}
        if gap.mean() > 0:
            winner = origin
    notes["improved"] = space.key(winner) != space.key(origin)
    if not notes["improved"]:
        notes["said"] = "nothing was found that is better than the sampler the search started from, which is returned"
    return winner, notes
