"""Align Your Steps: noise levels by coordinate search on KLUB, stopped where the samples are best."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from torch import Tensor

from diffaccel.pictures import save_text
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.search.gits import table_at
from diffaccel.samplers.search.klub import Klub, gaps, refined
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory
from diffaccel.samplers.search.rollout import errors
from diffaccel.samplers.solver import PURE_NOISE, Multistep
from diffaccel.samplers.spacing import karras
from diffaccel.samplers.tabulate import Found, Table

LADDER = (10, 20, 40)
NEAREST, FURTHEST = 0.01, 0.7  # candidates' distances, as shares of the log-distance to the neighbour
SETTLED = 1e-3  # largest relative change of a pass that ends the search
PATIENCE = 5  # passes without a better error that end it
CHUNK = 8  # clean samples between two writes of the cache


@torch.no_grad()
def ays(
    problem: Problem,
    trajectory: Trajectory,
    steps: int,
    *,
    solver: Multistep,
    data: Tensor | None = None,
    samples: int = 128,
    levels: int = 64,
    passes: int = 30,
    candidates: int = 11,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Found:
    """Grid of `steps` calls by Align Your Steps (arXiv:2404.14507, algorithms 1 and 2), with the rows of `solver`.

    Levels between the most and the least trained noise are moved one at a time to the best of a few candidates by KLUB
    (see `Klub`), pass after pass. Up to 10 steps, `steps` intervals are optimised; above, 10, which are then halved at
    their geometric middles, where only the new levels move, to 20 or 40, whichever is nearest in ratio, and the
    logarithms of those are interpolated to `steps`. As with the published lists, the run's last step goes from the
    last but one of these levels to sigma = 0 instead of the least noise.

    KLUB is only a bound, and of a first-order stochastic sampler: schedules optimised to the end are worse than those
    stopped on the way, and the paper stops by a perceptual metric or by eye. Here every pass, and the start, is
    judged by the error of `solver` on the trajectory's pairs (geometric mean); the best is subdivided, and the best of
    all is returned.

    Where else we depart. The paper draws t anew for every decision, from a density near that of KLUB's integrand, and
    calls the network for every candidate; as printed, its estimator leaves out the density's normalisation, which
    differs between candidates, so that for Gaussian data it finds all of them equally good. Here the network is called
    once for each clean sample at fixed levels, all of them on one path of growing noise. That gives the expectation
    in KLUB for all pairs of levels, so all decisions share all samples, the integral's weight is exact, and the search
    itself calls no network. Candidates lie at growing distances on both sides of the current level (the paper does not
    say where), a parabola refines the best, and a pass goes from the clean end, where KLUB is largest, to the noisy
    one. It starts even in time, or with EDM's rho = 7 on VE paths, as the paper does.

    Args:
        problem: pairs of the trajectory.
        trajectory: reference; its ends are the clean data if there is no `data`, and every pass is judged by them.
        steps: network calls, 1 to the number of training timesteps.
        solver: a deterministic multistep solver.
        data: (m, ...) clean samples of the network's data (latents); sample i gets the condition of pair i modulo B.
        samples: clean samples that are noised.
        levels: noise levels of each, 4 or more, even in log sigma: `samples` * `levels` network calls.
        passes: at most, over each rung of 10, 20, 40; five without a better error are the last.
        candidates: for a level, with the current one, odd, 3 or more.
        seed: of the random numbers.
        cache: folder where all that was computed is written under a hash of the settings, so that an interrupted search
            goes on.
        progress: show a progress bar.

    Raises:
        ValueError: for settings outside these ranges, a singlestep or a stochastic solver.
    """
    schedule = problem.schedule
    _check(schedule, steps, samples, levels, passes, candidates)
    clean = (trajectory.end if data is None else data).detach().cpu().float()
    top, end = _sigmas(np.array([float(trajectory.lambdas[0]), schedule.lambda_min_noise]))
    said = [problem.key, steps, repr(solver), samples, levels, passes, candidates, seed, top, end]
    journal = Journal(cache, said, [trajectory.end, clean])

    def table_of(sigmas: FloatArray) -> Table:
        inner = -np.log(interpolated(sigmas, steps)[1:-1])
        return table_at(schedule, np.array([trajectory.lambdas[0], *inner]), solver)

    def judge(sigmas: FloatArray) -> float:
        # Geometric, as a few pairs that change their picture have most of the mean: on emoji-sd that kept the start.
        return float(errors(problem, table_of(sigmas), trajectory).clamp_min(1e-30).log().mean().exp())

    table_of(np.array([top, end]))  # refuses a solver before the work, not after
    klub = _klub(problem, clean, samples, np.geomspace(end, top, levels), seed, journal, progress)
    search = Search(klub, judge, journal, candidates, [])
    rungs = ladder(steps)
    sigmas = start_levels(schedule, top, end, rungs[0])
    with tqdm(total=passes * len(rungs), desc="ays: passes", disable=not progress) as bar:
        for i, rung in enumerate(rungs):
            sigmas = halved(sigmas) if i else sigmas
            sigmas = search.rung(sigmas, range(1, rung, 2 if i else 1), passes, bar)
    best = min(search.history, key=lambda one: one["error"])
    found = table_of(np.array(best["sigmas"]))
    notes = {"method": "ays", "sigmas": np.exp(-np.array(found.lambdas)).tolist(), "history": search.history}
    notes |= {"chosen": search.history.index(best), "samples": samples, "levels": levels, "seed": seed}
    return Found(found, notes)


def _check(schedule: NoiseSchedule, steps: int, samples: int, levels: int, passes: int, candidates: int) -> None:
    if not 1 <= steps <= schedule.count:
        raise ValueError(f"steps must be between 1 and the {schedule.count} training timesteps, not {steps}")
    if candidates < 3 or candidates % 2 == 0:
        raise ValueError(f"candidates must be an odd number, 3 or more (11 in the paper), not {candidates}")
    if samples < 1 or levels < 4 or passes < 0:
        raise ValueError(
            f"samples must be 1 or more, levels 4 or more and passes 0 or more, not {samples}, {levels} and {passes}"
        )


def _klub(
    problem: Problem, clean: Tensor, samples: int, levels: FloatArray, seed: int, journal: Journal, progress: bool
) -> Klub:
    """KLUB by `samples` of the clean data, a chunk at a time."""
    total = np.zeros((len(levels), len(levels)))
    with tqdm(total=samples, desc="ays: samples", disable=not progress) as bar:
        for first in range(0, samples, CHUNK):
            chosen = torch.arange(first, min(first + CHUNK, samples)) % len(clean)
            generator = torch.Generator().manual_seed(_seed(seed, first))

            def compute(chosen: Tensor = chosen, generator: torch.Generator = generator) -> list[Any]:
                return gaps(problem, clean[chosen], chosen % len(problem), levels, generator).tolist()

            total += len(chosen) / samples * np.array(journal.once(compute))
            bar.update(len(chosen))
    return refined(Klub(levels, total), 4)


@dataclass(frozen=True, eq=False)
class Search:
    """Coordinate search over the levels of a schedule.

    Attributes:
        klub: what a level is moved by.
        judge: error of a schedule, which chooses among passes.
        journal: of all that calls the network.
        candidates: of each decision.
        history: what was judged: intervals, pass, sigmas, klub, error.
    """

    klub: Klub
    judge: Callable[[FloatArray], float]
    journal: Journal
    candidates: int
    history: list[dict[str, Any]]

    def rung(self, sigmas: FloatArray, free: Sequence[int], passes: int, bar: Any) -> FloatArray:
        """Move the `free` of the `sigmas` for some passes; the best by error, with the start."""
        tried = [self.record(sigmas, 0)]
        for count in range(passes):
            before, sigmas = sigmas, self.passed(sigmas, free)
            if not len(free) or np.abs(np.log(sigmas / before)).max() < SETTLED:
                break
            tried.append(self.record(sigmas, count + 1))
            bar.update()
            bar.set_postfix(error=f"{tried[-1]['error']:.4g}", klub=f"{tried[-1]['klub']:.4g}")
            if min(tried, key=lambda one: one["error"])["pass"] <= count + 1 - PATIENCE:
                break
        return np.array(min(tried, key=lambda one: one["error"])["sigmas"])

    def passed(self, sigmas: FloatArray, free: Sequence[int]) -> FloatArray:
        """Each of the `free` levels at the best candidate by the KLUB of the two intervals that it divides."""
        sigmas = sigmas.copy()
        for i in reversed(free):
            high, low = float(sigmas[i - 1]), float(sigmas[i + 1])
            tried = around(low, float(sigmas[i]), high, self.candidates)
            sigmas[i] = lowest(tried, np.array([self.klub.of_schedule([high, one, low]) for one in tried]))
        return sigmas

    def record(self, sigmas: FloatArray, count: int) -> dict[str, Any]:
        """Judge `sigmas` after `count` passes."""
        error = float(self.journal.once(lambda: self.judge(sigmas)))
        made = {"intervals": len(sigmas) - 1, "pass": count, "sigmas": sigmas.tolist()}
        self.history.append(made | {"klub": self.klub.of_schedule(sigmas), "error": error})
        return self.history[-1]


class Journal:
    """Numbers that a long search computed, in order, kept in a file: a search run again reads them instead.

    Nothing but the order says which number is whose, so the search between them must be deterministic.
    """

    def __init__(self, folder: str | Path | None, settings: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        self.path: Path | None = None
        self.numbers: list[Any] = []
        self.at = 0
        if folder is None:
            return
        said = hashlib.sha256(json.dumps(settings).encode())
        for tensor in tensors:
            said.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self.path = Path(folder) / f"ays-{said.hexdigest()[:20]}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.numbers = json.loads(self.path.read_text(encoding="utf-8"))

    def once(self, compute: Callable[[], Any]) -> Any:
        """The next numbers: as they were written, or computed and written."""
        if self.at == len(self.numbers):
            self.numbers.append(compute())
            if self.path is not None:
                save_text(json.dumps(self.numbers), self.path)
        self.at += 1
        return self.numbers[self.at - 1]


def ladder(steps: int) -> tuple[int, ...]:
    """Counts of intervals that are optimised one after the other for a run of `steps` calls."""
    if steps <= LADDER[0]:
        return (steps,)
    nearest = min(LADDER, key=lambda count: abs(math.log(count / steps)))
    return LADDER[: LADDER.index(nearest) + 1]


def start_levels(schedule: NoiseSchedule, top: float, end: float, intervals: int) -> FloatArray:
    """Levels even in the network's time, or with EDM's rho = 7 where that is its clock; both ends are exact."""
    if schedule.path == "ve":
        levels = karras(top, end, intervals + 1)
    else:
        first, last = schedule.time_at(-np.log([top, end]))
        levels = _sigmas(schedule.lambda_at(np.linspace(first, last, intervals + 1)))
    levels[[0, -1]] = top, end
    return levels


def around(low: float, current: float, high: float, count: int) -> FloatArray:
    """`count` candidates for a level between its neighbours, itself first, at growing distances on both sides."""
    reach = np.geomspace(NEAREST, FURTHEST, count // 2)
    return np.concatenate([[current], current * (low / current) ** reach, current * (high / current) ** reach])


def lowest(levels: FloatArray, values: FloatArray) -> float:
    """The best of the candidates, or the vertex of the parabola in log level through it and those beside it."""
    order = np.argsort(levels)
    log, values = np.log(levels[order]), values[order]
    k = int(values.argmin())
    if k in (0, len(log) - 1):
        return float(levels[order[k]])
    (a, b), (fa, fb) = log[[k - 1, k + 1]] - log[k], values[[k - 1, k + 1]] - values[k]
    curvature, slope = (fa / a - fb / b) / (a - b), (fb * a / b - fa * b / a) / (a - b)
    return float(np.exp(log[k] - slope / (2 * curvature))) if curvature > 0 else float(levels[order[k]])


def halved(levels: FloatArray) -> FloatArray:
    """Levels with the geometric middle of every interval added."""
    return interpolated(levels, 2 * (len(levels) - 1))


def interpolated(levels: FloatArray, intervals: int) -> FloatArray:
    """Levels of another number of intervals; their logarithm is piecewise linear in the index (the paper's way)."""
    share = [np.linspace(0, 1, n + 1) for n in (intervals, len(levels) - 1)]
    return np.exp(np.interp(share[0], share[1], np.log(levels)))


def _sigmas(lambdas: FloatArray) -> FloatArray:
    """Sigma / alpha; of (nearly) pure noise, where all predictions are the same, a level that can be divided."""
    return np.minimum(np.exp(-lambdas), PURE_NOISE)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
