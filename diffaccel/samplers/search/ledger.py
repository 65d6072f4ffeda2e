"""Ledger: the errors of every sampler that a search has run, pair by pair, in a file that outlives an interruption."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from diffusers.utils.logging import tqdm

from diffaccel.pictures import save_text
from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory

G = TypeVar("G")
WORST = 1e6  # error of runs that blow up
SAVE_SECONDS = 5.0


class BudgetError(Exception):
    """The evaluations are used up."""


class Space(Protocol[G]):
    """What evolution needs to know of genomes."""

    def key(self, genome: G, /) -> str:
        """Equal for genomes that are one sampler."""
        ...

    def features(self, genome: G, /) -> FloatArray:
        """Numbers that the predictor sees, as many for all genomes."""
        ...

    def mutate(self, genome: G, rng: np.random.Generator, /) -> G:
        """A changed copy."""
        ...

    def cross(self, first: G, second: G, rng: np.random.Generator, /) -> G:
        """A child of two."""
        ...

    def cost(self, genome: G, /) -> float:
        """Of a run, as a share of the runs that the budget counts."""
        ...

    def score(self, genome: G, rows: Sequence[int], /) -> FloatArray:
        """Errors of the given pairs."""
        ...


class Ledger(Generic[G]):
    """Errors of all genomes so far, pair by pair, and what they cost.

    The pairs stand in one order for all genomes, and a genome is run on the first few: any two are compared on the same
    pairs. What is in the file of an interrupted search is not run again but counted as if it were, and so the search,
    whose every choice follows from its seed and these errors, goes on as it would have.

    Attributes:
        spent: runs of all pairs, so far.
        run: those that were not in the file.
    """

    def __init__(
        self, space: Space[G], order: Sequence[int], evaluations: float, file: Path | None, bar: Any, unit: int
    ) -> None:
        self.space, self.order, self.evaluations, self.file, self.bar = space, list(order), evaluations, file, bar
        self.unit = unit  # pairs of a whole evaluation
        self.spent = self.run = 0.0
        self._errors: dict[str, list[float]] = {}
        self._stored: dict[str, list[float]] = (
            json.loads(file.read_text()) if file is not None and file.exists() else {}
        )
        self._saved = time.monotonic()

    @property
    def pairs(self) -> int:
        """Pairs that genomes are selected on."""
        return len(self.order)

    def count(self, genome: G) -> int:
        """Pairs that the genome was run on."""
        return len(self._errors.get(self.space.key(genome), ()))

    def errors(self, genome: G, count: int) -> FloatArray:
        """Errors of the first `count` pairs.

        Raises:
            BudgetError: if running those that are missing would pass the budget.
        """
        key = self.space.key(genome)
        known = self._errors.setdefault(key, [])
        if missing := count - len(known):
            if missing < 0:
                return np.array(known[:count])
            cost = missing * self.space.cost(genome) / self.unit
            if self.spent + cost > self.evaluations:
                raise BudgetError
            stored = self._stored.get(key, [])
            if len(stored) >= count:
                new = stored[len(known) : count]
            else:
                found = self.space.score(genome, self.order[len(known) : count])
                new = [float(v) for v in np.nan_to_num(found, nan=WORST, posinf=WORST).clip(max=WORST)]
                self.run += cost
            known += new
            self.spent += cost
            self.bar.update(min(cost, self.bar.total - self.bar.n))
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
        return np.array(known)

    def save(self) -> None:
        """Write what is known."""
        if self.file is not None:
            longer = {k: v for k, v in self._stored.items() if len(v) > len(self._errors.get(k, ()))}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_text(json.dumps(self._errors | longer), self.file)
        self._saved = time.monotonic()


def summary(errors: FloatArray) -> dict[str, float | int | None]:
    """Mean error of some pairs, and the standard error of it."""
    spread = float(errors.std(ddof=1)) / math.sqrt(len(errors)) if len(errors) > 1 else None
    return {"mean": float(errors.mean()), "standard_error": spread, "pairs": len(errors)}


def cache_file(cache: str | Path | None, name: str, problem: Problem, trajectory: Trajectory, said: Any) -> Path | None:
    """Where a search of this problem with these settings keeps its errors."""
    if cache is None:
        return None
    digest = hashlib.sha256(json.dumps([problem.key, said], sort_keys=True, default=str).encode())
    for tensor in (problem.noise, trajectory.end):  # the end knows the network and its guidance
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return Path(cache) / f"{name}-{digest.hexdigest()[:20]}.json"


def progress_bar(name: str, evaluations: float, progress: bool) -> Any:
    """A bar over evaluations."""
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}]"
    return tqdm(total=evaluations, desc=name, disable=not progress, bar_format=bar_format)
