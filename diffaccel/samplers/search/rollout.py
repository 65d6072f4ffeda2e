"""Runs of a table on a problem."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.skipping import skipping
from diffaccel.samplers.tabulate import Table

if TYPE_CHECKING:
    from diffaccel.samplers.search.reference import Trajectory


Skips = Sequence[Sequence[str]]


@torch.no_grad()
def rollout(problem: Problem, table: Table, skips: Skips | None = None) -> Tensor:
    """(B, ...) float32 samples at the end of the run."""
    return run(problem, table, skips=skips)[0][-1]


def run(
    problem: Problem, table: Table, calls: int | None = None, skips: Skips | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Samples x at all nodes of the run, and the x0 prediction of each call.

    Args:
        problem: the network and its starts.
        table: the sampler.
        calls: stop after so many.
        skips: names of the layers that the network leaves out, of each call.
    """
    alphas = [problem.schedule.alpha_sigma(lam)[0] for lam in table.lambdas]
    states, known = [problem.noise], []
    for i, row in enumerate(table.rows[:calls]):
        with skipping(problem.network, skips[i]) if skips and problem.network else nullcontext():
            known.append(problem.denoise(states[-1], table.lambdas[i], float(table.timesteps[i])))
        states.append(advanced(row, states[-1], known, alphas[i], alphas[i + 1]))
    return states, known


def advanced(
    row: Sequence[float] | Tensor, x: Tensor, known: Sequence[Tensor], alpha: float | Tensor, end: float | Tensor
) -> Tensor:
    """One step of a table, from the predictions known so far (oldest first), as `NonStationary` has it."""
    y = x * (row[0] / alpha)
    for weight, x0 in zip(row[1:], reversed(known), strict=True):
        y = y + weight * x0
    return y * end


@torch.no_grad()
def errors(problem: Problem, table: Table, reference: Trajectory, skips: Skips | None = None) -> Tensor:
    """(B,) float64 mean squared error of each sample to that of the reference."""
    return mse(rollout(problem, table, skips), reference.end)


def mse(samples: Tensor, wanted: Tensor) -> Tensor:
    """(B,) float64 mean squared difference."""
    return (samples.double() - wanted.double()).square().flatten(1).mean(1)
