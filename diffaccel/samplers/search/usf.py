"""USF: every step of a run decides for itself where it is, its order, what it predicts, and whether it is redone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.search.evolution import evolve, judged, split_pairs
from diffaccel.samplers.search.genome import ESTIMATES, PREDICTIONS, Decision, Genome
from diffaccel.samplers.search.ledger import Ledger, cache_file, progress_bar
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory
from diffaccel.samplers.search.rollout import advanced, mse
from diffaccel.samplers.tabulate import Found, Table

ORDERS = {1: 2 / 9, 2: 4 / 9, 3: 3 / 9}  # how often each is drawn; the authors' .2, .4, .3 without order 4
MUTATION = 0.3
CROSSOVER = 0.3
NODE_STD = 0.08  # of a mutation of a node, in half log-SNR: 8 % of sigma / alpha
CLOSEST = 0.02  # two nodes, in half log-SNR

STARTING_SPACINGS = ("logsnr", "karras", "trailing", "beta")
STARTING_DECISIONS = {  # known samplers, by their names in SOLVERS
    "ddim": Decision(1),
    "dpmpp_2m": Decision(2),
    "dpmpp_3m": Decision(3),
    "dpm_2m": Decision(2, "epsilon"),
    "unipc": Decision(2, corrector=True),
    "unipc_1_bh1": Decision(1, estimate="bh1", corrector=True),
    "er_ode_1_corrected": Decision(1, estimate="sigma", corrector=True),
    "deis_rhoab1": Decision(2, "epsilon", "sigma"),
}


def usf(
    problem: Problem,
    trajectory: Trajectory,
    steps: int,
    *,
    evaluations: int = 400,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Found:
    """Search the sampler of `steps` calls with the least mean error on the problem's pairs.

    USF / S3 (arXiv:2312.07243): each step has its node, order, prediction type, derivative estimate and corrector, and
    evolution finds them, led by a predictor that is trained on what was run. It starts from known samplers, so that it
    returns one of them at worst. Ours differs from the authors' code in what is minimised: the mean squared distance of
    the sample to the converged solution from the same noise, instead of FID on 1000 pictures, which costs a thousandth
    and which their searches overfitted. There are no orders above 3, no steps without a call, and the relaxations of
    derivatives are the named ones alone.

    A quarter of eight or more pairs has no part in the search and judges the winner: if they prefer the best known
    sampler, that is returned.

    Args:
        problem: pairs to search on.
        trajectory: their reference.
        steps: network calls, 1 or more.
        evaluations: budget, in runs of all pairs. Most genomes are run on a few pairs only, and count as much.
        seed: of mutations and of the order of the pairs.
        cache: folder that keeps errors, so that an interrupted search goes on.
        progress: show a progress bar over evaluations.

    Returns:
        The sampler. Notes: `genome`, `start` (the known sampler it descends from is the best of), errors of both on the
        pairs they were selected on and on those they were not, each with its standard error, `evaluations`, `history`.
        With few pairs the error on those of the selection is too good; the other one is not.

    Raises:
        ValueError: for a budget that does not suffice to run the known samplers, or steps below 1.
    """
    if evaluations < 1:
        raise ValueError(f"a search needs evaluations, some hundred; not {evaluations}")
    rng = np.random.default_rng(seed)
    space = Decisions(problem, trajectory)
    named = starting_genomes(problem.schedule, steps)
    order, held = split_pairs(len(problem), rng)
    file = cache_file(cache, "usf", problem, trajectory, [steps, seed])
    with progress_bar(f"usf, {steps} steps", evaluations, progress) as bar:
        ledger = Ledger(space, order, evaluations, file, bar, len(problem))
        evolved = evolve(space, list(named.values()), ledger, rng, crossover=CROSSOVER)
        winner, notes = judged(space, evolved, ledger, held)
    names = {space.key(genome): name for name, genome in reversed(named.items())}
    said = {"method": "usf", "genome": winner.to_json(), "start": names[space.key(evolved.origin)], "seed": seed}
    return Found(space.table(winner), said | notes)


def starting_genomes(schedule: NoiseSchedule, steps: int) -> dict[str, Genome]:
    """Known samplers on known grids, by name; those that end at the smallest trained noise have `to sigma_min`."""
    spacings = (*STARTING_SPACINGS, *(("flow",) if schedule.path == "flow" else ()))
    found = {}
    for spacing in spacings:
        for final in ("zero", "sigma_min") if spacing in ("logsnr", "karras") else ("zero",):
            grid = time_grid(schedule, steps, spacing, final=final)
            for name, decision in STARTING_DECISIONS.items():
                label = f"{name} on {spacing}" + (" to sigma_min" if math.isfinite(grid.lambdas[-1]) else "")
                found[label] = Genome(grid.lambdas[:-1], (decision,) * steps, grid.lambdas[-1])
    return found


@dataclass(eq=False)
class Decisions:
    """The space of genomes of one problem, see `ledger.Space`.

    All runs of one start share their first call, which is made once.
    """

    problem: Problem
    trajectory: Trajectory

    def __post_init__(self) -> None:
        self._first: dict[tuple[float, float], Tensor] = {}
        self._tables: dict[Genome, Table] = {}

    def table(self, genome: Genome) -> Table:
        """Its sampler."""
        if genome not in self._tables:
            if len(self._tables) > 5000:
                self._tables.clear()
            self._tables[genome] = genome.table(self.problem.schedule)
        return self._tables[genome]

    def key(self, genome: Genome) -> str:
        """Nodes and weights: many lists of decisions make one table."""
        table = self.table(genome)
        numbers = [*table.lambdas, *(w for row in table.rows for w in row)]
        return " ".join(f"{v:.7g}" for v in numbers)

    def features(self, genome: Genome) -> FloatArray:
        """Distances of the nodes and weights, in numbers of one size: the sampler itself, not its description."""
        table = self.table(genome)
        lam = np.array(table.lambdas)
        last = min(lam[-1], lam[-2] + 10.0)
        noise = np.exp(-np.append(lam[:-1], last))
        shares = np.concatenate([np.array(row) / (1 + noise[i]) for i, row in enumerate(table.rows)])
        return np.concatenate([np.diff(lam[:-1]), [last - lam[-2]], np.arcsinh(shares)])

    def cost(self, genome: Genome) -> float:
        """All runs have as many calls."""
        return 1.0

    @torch.no_grad()
    def score(self, genome: Genome, rows: Sequence[int]) -> FloatArray:
        """Mean squared error of the samples of `rows` to the reference's."""
        table, schedule, pairs = self.table(genome), self.problem.schedule, torch.tensor(list(rows))
        alphas = [schedule.alpha_sigma(lam)[0] for lam in table.lambdas]
        x, known = self.problem.noise[pairs], []
        for i, row in enumerate(table.rows):
            lam, told = table.lambdas[i], float(table.timesteps[i])
            x0 = self._first_call(lam, told)[pairs] if i == 0 else self.problem.denoise(x, lam, told, pairs)
            known.append(x0)
            x = advanced(row, x, known, alphas[i], alphas[i + 1])
        return mse(x, self.trajectory.end[pairs]).numpy()

    def _first_call(self, lam: float, told: float) -> Tensor:
        if (lam, told) not in self._first:
            self._first[lam, told] = self.problem.denoise(self.problem.noise, lam, told)
        return self._first[lam, told]

    def mutate(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """Change about `MUTATION` of its genes, but in half of the children of one step only, and at least one.

        Nodes move by a Gaussian whose width is drawn too, from a quarter of `NODE_STD` to four times as much: known
        grids are far from the best one, and the best one wants small steps.
        """
        n = len(genome.lambdas)
        steps = range(n) if rng.random() < 0.5 else [int(rng.integers(n))]
        width = NODE_STD * 4 ** rng.uniform(-1, 1)
        nodes, decisions, end = list(genome.lambdas), list(genome.decisions), genome.end
        for i in steps:
            if i and (rng.random() < MUTATION or len(steps) == 1):
                nodes[i] += float(rng.normal(0, width))
            decisions[i] = self._mutated(decisions[i], rng)
        least = self.problem.schedule.lambda_min_noise
        if rng.random() < MUTATION / 4:
            end = least if math.isinf(end) else math.inf
        return self._repaired(nodes, decisions, end)

    def _mutated(self, decision: Decision, rng: np.random.Generator) -> Decision:
        if rng.random() < MUTATION:
            decision = replace(decision, order=int(rng.choice(list(ORDERS), p=list(ORDERS.values()))))
        if rng.random() < MUTATION:
            decision = replace(decision, prediction=PREDICTIONS[int(rng.integers(len(PREDICTIONS)))])
        if rng.random() < MUTATION:
            decision = replace(decision, estimate=ESTIMATES[int(rng.integers(len(ESTIMATES)))])
        if rng.random() < MUTATION:
            decision = replace(decision, corrector=bool(rng.integers(2)))
        return decision

    def cross(self, first: Genome, second: Genome, rng: np.random.Generator) -> Genome:
        """Steps of one and then of the other; in half of the children nodes between theirs, or beyond."""
        n = len(first.lambdas)
        cut = int(rng.integers(n + 1))
        decisions = [*first.decisions[:cut], *second.decisions[cut:]]
        if rng.random() < 0.5:
            share = rng.uniform(-0.5, 1.5)
            nodes = [(1 - share) * a + share * b for a, b in zip(first.lambdas, second.lambdas, strict=True)]
        else:
            nodes = [*first.lambdas[:cut], *second.lambdas[cut:]]
        return self._repaired([first.lambdas[0], *nodes[1:]], decisions, second.end if cut < n else first.end)

    def _repaired(self, nodes: Sequence[float], decisions: Sequence[Decision], end: float) -> Genome:
        """Nodes in order, apart, and inside the trained range; the first call stays where the noise is."""
        least = self.problem.schedule.lambda_min_noise
        lam = np.array([nodes[0], *sorted(nodes[1:])])
        for i in range(1, len(lam)):
            lam[i] = max(lam[i], lam[i - 1] + CLOSEST)
        highest = least - CLOSEST * np.arange(len(lam))[::-1] - (CLOSEST if math.isfinite(end) else 0.0)
        lam[1:] = np.minimum(lam, highest)[1:]
        return Genome((nodes[0], *(round(float(v), 5) for v in lam[1:])), tuple(decisions), end)
