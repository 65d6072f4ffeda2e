"""Runs that leave out layers: how they are scored, mutated, crossed, and kept within a budget of whole calls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.schedule import FloatArray
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory
from diffaccel.samplers.search.rollout import advanced, mse
from diffaccel.samplers.search.skipping import skipping
from diffaccel.samplers.solver import Multistep
from diffaccel.samplers.tabulate import Table, grid_of, tabulate

MUTATION = 0.25
NODE_STD = 0.08  # as `usf`
CLOSEST = 0.02
LEVELS = 4  # noise levels at which each layer is left out once, to know what it is worth there
MOST_CALLS = 2  # times the budget
DDIM = ExponentialAdams(order=1)


@dataclass(frozen=True)
class Skips:
    """A run: half log-SNR of its calls, increasing, and the numbers of the layers that each call leaves out, sorted."""

    lambdas: tuple[float, ...]
    skipped: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layers:
    """Layers of a network that can be left out.

    Attributes:
        names: in the network.
        saves: (L,) shares of a call's multiply-accumulates.
        damage: (L, LEVELS) mean squared change of the x0 prediction without each of them, at some noise levels.
        levels: (LEVELS,) half log-SNR of these.
    """

    names: tuple[str, ...]
    saves: FloatArray
    damage: FloatArray
    levels: FloatArray

    def price(self, lam: float) -> FloatArray:
        """(L,) damage at half log-SNR `lam` for what is saved."""
        level = int(np.abs(self.levels - lam).argmin())
        return (self.damage[:, level] + 1e-12) / np.maximum(self.saves, 1e-6)


@dataclass(eq=False)
class Skipping:
    """The space of runs of one problem within a budget of whole calls, see `ledger.Space`."""

    problem: Problem
    trajectory: Trajectory
    network: nn.Module
    layers: Layers
    steps: int
    solver: Multistep = DDIM
    _tables: dict[tuple[float, ...], Table] = field(default_factory=dict, repr=False)
    _first: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def table(self, run: Skips) -> Table:
        """Its sampler."""
        if run.lambdas not in self._tables:
            if len(self._tables) > 5000:
                self._tables.clear()
            self._tables[run.lambdas] = tabulate(
                self.problem.schedule, grid_of(self.problem.schedule, run.lambdas), self.solver
            )
        return self._tables[run.lambdas]

    def key(self, run: Skips) -> str:
        """Nodes and layers."""
        return " ".join(f"{v:.7g}" for v in run.lambdas) + " " + str(run.skipped)

    def whole_calls(self, run: Skips) -> float:
        """Cost of a run, in calls of the whole network."""
        return len(run.lambdas) - sum(
            float(self.layers.saves[list(skipped)].sum()) for skipped in run.skipped if skipped
        )

    def cost(self, run: Skips) -> float:
        """As a share of the budget."""
        return self.whole_calls(run) / self.steps

    def features(self, run: Skips) -> FloatArray:
        """Of any number of calls: their density, and what is left out and lost at each noise level."""
        lam = np.array(run.lambdas)
        spread = (
            np.interp(np.linspace(0, 1, 9)[1:], np.linspace(0, 1, len(lam)), lam)
            if len(lam) > 1
            else np.full(8, lam[0])
        )
        saved, lost = np.zeros(LEVELS), np.zeros(LEVELS)
        for node, skipped in zip(lam, run.skipped, strict=True):
            level = int(np.abs(self.layers.levels - node).argmin())
            saved[level] += self.layers.saves[list(skipped)].sum()
            lost[level] += self.layers.damage[list(skipped), level].sum()
        return np.concatenate(
            [spread, [len(lam), saved.sum()], saved, np.log(lost + 1e-6), [np.log(lost.sum() + 1e-6)]]
        )

    @torch.no_grad()
    def score(self, run: Skips, rows: Sequence[int]) -> FloatArray:
        """Mean squared error of the samples of `rows` to the reference's."""
        table, pairs = self.table(run), torch.tensor(list(rows))
        alphas = [self.problem.schedule.alpha_sigma(lam)[0] for lam in table.lambdas]
        x, known = self.problem.noise[pairs], []
        for i, row in enumerate(table.rows):
            known.append(self._call(run, table, i, x, pairs))
            x = advanced(row, x, known, alphas[i], alphas[i + 1])
        return mse(x, self.trajectory.end[pairs]).numpy()

    def _call(self, run: Skips, table: Table, i: int, x: Tensor, pairs: Tensor) -> Tensor:
        lam, told, skipped = table.lambdas[i], float(table.timesteps[i]), run.skipped[i]
        names = [self.layers.names[k] for k in skipped]
        whole = i == 0 and not skipped  # then it is the first call of many runs, and made once
        if whole and (lam, told) in self._first:
            return self._first[lam, told][pairs]
        with skipping(self.network, names) if names else nullcontext():
            if not whole:
                return self.problem.denoise(x, lam, told, pairs)
            self._first[lam, told] = self.problem.denoise(self.problem.noise, lam, told)
        return self._first[lam, told][pairs]

    def mutate(self, run: Skips, rng: np.random.Generator) -> Skips:
        """Move nodes, add or leave out a call, or change what some calls skip; then make it fit the budget."""
        kind = rng.random()
        if kind < 0.4:
            run = self._moved(run, rng)
        elif kind < 0.5 and len(run.lambdas) < MOST_CALLS * self.steps:
            run = self._with_call(run, rng)
        elif kind < 0.6 and len(run.lambdas) > 1:
            run = _without_call(run, int(rng.integers(1, len(run.lambdas))))
        else:
            run = self._reskipped(run, rng)
            if rng.random() < 0.5:
                run = self._moved(run, rng)
        return self._fitted(run, rng)

    def cross(self, first: Skips, second: Skips, rng: np.random.Generator) -> Skips:
        """Noisy calls of one and the later ones of the other, cut at a noise level; within the budget."""
        cut = rng.uniform(first.lambdas[0], self.problem.schedule.lambda_min_noise)
        calls = [pair for pair in zip(first.lambdas, first.skipped, strict=True) if pair[0] <= cut]
        calls += [pair for pair in zip(second.lambdas, second.skipped, strict=True) if pair[0] > cut]
        nodes, skipped = zip(*calls, strict=True)
        return self._fitted(self._apart(nodes, skipped), rng)

    def cheapened(self, run: Skips) -> Skips | None:
        """The run with as many skips as its budget asks for, cheapest first; None if all of them do not suffice."""
        while (left := self.whole_calls(run) - self.steps) > 1e-6:
            prices = self._prices(run)
            if not np.isfinite(prices).any():
                return None
            # A layer that saves more than is still missing is worth what is missing.
            waste = np.maximum(self.layers.saves / left, 1.0)
            i, layer = np.unravel_index(int(np.argmin(prices * waste)), prices.shape)
            run = _with_skip(run, int(i), int(layer))
        return run

    def _prices(self, run: Skips) -> FloatArray:
        """(calls, L) of what is not skipped yet; inf for what is."""
        prices = np.stack([self.layers.price(lam) for lam in run.lambdas])
        for i, skipped in enumerate(run.skipped):
            prices[i, list(skipped)] = math.inf
        prices[:, self.layers.saves <= 0] = math.inf
        return prices

    def _fitted(self, run: Skips, rng: np.random.Generator) -> Skips:
        """Within the budget: skips are added by chance, mostly cheap ones, or calls taken out."""
        while self.whole_calls(run) > self.steps + 1e-6:
            prices = self._prices(run)
            if not np.isfinite(prices).any() or (len(run.lambdas) > self.steps and rng.random() < 0.05):
                run = _without_call(run, int(rng.integers(1, len(run.lambdas))))
                continue
            run = _with_skip(run, *_cheap(prices, rng))
        return run

    def _moved(self, run: Skips, rng: np.random.Generator) -> Skips:
        if len(run.lambdas) == 1:
            return run
        width = NODE_STD * 4 ** rng.uniform(-1, 1)
        moves = rng.random(len(run.lambdas)) < MUTATION
        moves[int(rng.integers(1, len(moves)))] = True
        nodes = np.array(run.lambdas)
        nodes[1:] += np.where(moves, rng.normal(0, width, len(nodes)), 0.0)[1:]
        return self._apart(nodes, run.skipped)

    def _with_call(self, run: Skips, rng: np.random.Generator) -> Skips:
        """One call more, within an interval or after the last call."""
        nodes = np.append(run.lambdas, self.problem.schedule.lambda_min_noise)
        i = int(rng.integers(len(run.lambdas)))
        new = rng.uniform(nodes[i], nodes[i + 1])
        skipped = (*run.skipped[: i + 1], run.skipped[i], *run.skipped[i + 1 :])
        return self._apart((*nodes[: i + 1], new, *nodes[i + 1 : -1]), skipped)

    def _reskipped(self, run: Skips, rng: np.random.Generator) -> Skips:
        """Take some skips back, add others, or skip what a neighbour does."""
        for i in range(len(run.lambdas)):
            if rng.random() >= MUTATION:
                continue
            kind = rng.integers(3)
            if kind == 0 and run.skipped[i]:
                lost = int(rng.choice(run.skipped[i]))
                run = _with_skips(run, i, [k for k in run.skipped[i] if k != lost])
            elif kind == 1:
                prices = self._prices(run)[i : i + 1]
                if np.isfinite(prices).any():
                    run = _with_skip(run, i, _cheap(prices, rng)[1])
            elif kind == 2:
                run = _with_skips(run, i, run.skipped[max(i - 1, 0)])
        return run

    def _apart(self, nodes: Sequence[float] | FloatArray, skipped: Sequence[tuple[int, ...]]) -> Skips:
        """Nodes in order, apart and inside the trained range; the first call stays where the noise is."""
        order = [0, *(1 + np.argsort(nodes[1:], kind="stable"))]
        lam = np.array([nodes[i] for i in order], dtype=float)
        for i in range(1, len(lam)):
            lam[i] = max(lam[i], lam[i - 1] + CLOSEST)
        lam[1:] = np.minimum(lam, self.problem.schedule.lambda_min_noise - CLOSEST * np.arange(len(lam))[::-1])[1:]
        return Skips((float(nodes[0]), *(round(float(v), 5) for v in lam[1:])), tuple(skipped[i] for i in order))


def _cheap(prices: FloatArray, rng: np.random.Generator) -> tuple[int, int]:
    """(call, layer) drawn by chance, the cheaper the likelier."""
    chances = np.where(np.isfinite(prices), 1 / np.maximum(prices, 1e-12), 0.0)
    chances = chances**0.5
    i, layer = np.unravel_index(int(rng.choice(prices.size, p=(chances / chances.sum()).ravel())), prices.shape)
    return int(i), int(layer)


def _with_skips(run: Skips, i: int, layers: Iterable[int]) -> Skips:
    return replace(run, skipped=(*run.skipped[:i], tuple(sorted(layers)), *run.skipped[i + 1 :]))


def _with_skip(run: Skips, i: int, layer: int) -> Skips:
    return _with_skips(run, i, {*run.skipped[i], layer})


def _without_call(run: Skips, i: int) -> Skips:
    return Skips((*run.lambdas[:i], *run.lambdas[i + 1 :]), (*run.skipped[:i], *run.skipped[i + 1 :]))
