"""What `auto` learns of a sampler, as numbers that torch can change, and its run in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.samplers.grid import TimeGrid
from diffaccel.samplers.schedule import FloatArray, NoiseSchedule
from diffaccel.samplers.search.iia import DDIM
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.rollout import advanced
from diffaccel.samplers.solver import Multistep
from diffaccel.samplers.tabulate import Table, grid_of, tabulate

LEAST_GAP = 1e-2  # between nodes, in half log-SNR
STEP = 1e-5  # of the differences that give the derivative of a solver's weights by its nodes


class _WeightsOf(torch.autograd.Function):
    """Weights of a solver's table as a differentiable function of the half log-SNR of its nodes.

    Plain numbers of plain numbers: 2 n tables in float64 give their derivative by central differences, for any solver.
    """

    @staticmethod
    def forward(ctx: Any, lambdas: Tensor, weights: Callable[[FloatArray], FloatArray]) -> Tensor:  # pyright: ignore
        here = lambdas.detach().double().numpy()
        columns = []
        for i in range(len(here)):
            step = np.zeros_like(here)
            step[i] = STEP
            columns.append((weights(here + step) - weights(here - step)) / (2 * STEP))
        ctx.save_for_backward(torch.from_numpy(np.stack(columns, 1)))
        return torch.from_numpy(weights(here))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (jacobian,) = ctx.saved_tensors
        return jacobian.T @ gradient.double(), None


class Learned:
    """What is learned of a sampler of n calls, all float64.

    Attributes:
        spread: (n,) logits of the distances between the nodes in half log-SNR; the last is that to the least noise.
        told: (n,) shift of what the network is told at each node, in half log-SNR.
        weights: what the table has more than the solver's own, row by row.
    """

    def __init__(self, schedule: NoiseSchedule, solver: Multistep, lambdas: Sequence[float]) -> None:
        self.schedule, self.solver, self.n = schedule, solver, len(lambdas)
        self.first, self.last = float(lambdas[0]), schedule.lambda_min_noise
        gaps = np.diff([*lambdas, self.last])
        self.spread = torch.tensor(np.log(np.maximum(gaps, LEAST_GAP)), requires_grad=True)
        self.told = torch.zeros(self.n, dtype=torch.float64, requires_grad=True)
        self.sizes = [i + 2 for i in range(self.n)]
        self.weights = torch.zeros(sum(self.sizes), dtype=torch.float64, requires_grad=True)

    @classmethod
    def of(cls, schedule: NoiseSchedule, table: Table, solver: Multistep = DDIM) -> Learned:
        """To start from a table: its weights are those of the solver and something more."""
        learned = cls(schedule, solver, table.lambdas[:-1])
        with torch.no_grad():
            lambdas = learned.lambdas()
            told = torch.from_numpy(schedule.lambda_at(table.timesteps)) - lambdas
            learned.told.copy_(told)
            flat = torch.tensor([w for row in table.rows for w in row], dtype=torch.float64)
            learned.weights.copy_((flat - torch.cat(learned.rows(lambdas))) / learned.scale(lambdas))
        return learned

    def placement(self) -> FloatArray:
        """(2 n,) `spread` and `told`."""
        return torch.cat([self.spread, self.told]).detach().numpy()

    def placed(self, placement: FloatArray) -> TimeGrid:
        """Grid of a placement; this object stays what it is."""
        spread, told = torch.from_numpy(placement).split(self.n)
        lambdas = self._nodes(spread)
        return grid_of(
            self.schedule, lambdas.numpy(), timesteps=_falling(_time_at(self.schedule, lambdas + told)).numpy()
        )

    def lambdas(self) -> Tensor:
        """(n,) half log-SNR of the calls."""
        return self._nodes(self.spread)

    def _nodes(self, spread: Tensor) -> Tensor:
        share = spread.softmax(0).cumsum(0)[:-1]
        return self.first + (self.last - self.first) * torch.cat([torch.zeros(1, dtype=torch.float64), share])

    def times(self, lambdas: Tensor) -> Tensor:
        """(n,) what the network is told, inside of what it was trained on."""
        return _time_at(self.schedule, lambdas + self.told)

    def rows(self, lambdas: Tensor) -> list[Tensor]:
        """The table's rows."""
        base = _WeightsOf.apply(lambdas, self._base)
        return list((base + self.scale(lambdas) * self.weights).split(self.sizes))

    def scale(self, lambdas: Tensor) -> Tensor:
        """Unit of each weight: y is as large as sigma / alpha, so that equal numbers move the result equally."""
        of_sample = lambdas.clamp(max=0).exp()
        return torch.cat(
            [torch.cat([of_sample[i : i + 1], torch.ones(i + 1, dtype=torch.float64)]) for i in range(self.n)]
        )

    def _base(self, lambdas: FloatArray) -> FloatArray:
        grid = grid_of(self.schedule, lambdas)
        return np.concatenate([np.array(row) for row in tabulate(self.schedule, grid, self.solver).rows])

    def table(self) -> Table:
        """As it is now."""
        with torch.no_grad():
            lambdas = self.lambdas()
            rows = tuple(tuple(row.tolist()) for row in self.rows(lambdas))
            told = _falling(self.times(lambdas))
            return Table(grid_of(self.schedule, lambdas.numpy(), timesteps=told.numpy()), rows)

    def loss(self, problem: Problem, wanted: Tensor, floor: float) -> Tensor:
        """Mean logarithm of the squared error at the end of the run; differentiable in all that is learned."""
        lambdas = self.lambdas()
        times, rows = _falling(self.times(lambdas)), self.rows(lambdas)
        k = {"vp": 2, "flow": 1}.get(self.schedule.path)
        alphas = torch.ones_like(lambdas) if k is None else torch.sigmoid(k * lambdas) ** (1 / k)
        ends = torch.cat([alphas[1:], torch.ones(1, dtype=torch.float64)]).float()
        x, known = problem.noise, []
        for i, row in enumerate(rows):
            known.append(problem.denoise(x, lambdas[i], times[i]))
            x = advanced(row.float(), x, known, alphas[i].float(), ends[i])
        return ((x - wanted).square().flatten(1).mean(1) + floor).log().mean()


def _falling(times: Tensor) -> Tensor:
    """No time above the one before it: schedulers' timesteps fall."""
    return times.cummin(0).values


def _time_at(schedule: NoiseSchedule, lam: Tensor) -> Tensor:
    """`NoiseSchedule.time_at`, differentiable."""
    if schedule.path == "flow":
        return schedule.flow_end * torch.sigmoid(-lam)
    levels, times = torch.from_numpy(-schedule.lambdas), torch.from_numpy(schedule.times)
    i = torch.searchsorted(levels, -lam.detach()).clamp(1, len(levels) - 1)
    u = ((-lam - levels[i - 1]) / (levels[i] - levels[i - 1])).clamp(0, 1)
    return times[i - 1] + u * (times[i] - times[i - 1])
