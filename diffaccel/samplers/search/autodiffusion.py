"""AutoDiffusion: where the calls of a run are, and which layers of the network each of them leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from torch import nn

from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.search.evolution import evolve, judged, split_pairs
from diffaccel.samplers.search.ledger import Ledger, cache_file, progress_bar, summary
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.reference import Trajectory
from diffaccel.samplers.search.rollout import mse
from diffaccel.samplers.search.skipping import shares, skippable, skipping
from diffaccel.samplers.search.skips import DDIM, LEVELS, Layers, Skipping, Skips
from diffaccel.samplers.solver import Multistep
from diffaccel.samplers.tabulate import Found

CROSSOVER = 0.3  # the authors breed 25 by mutation and 10 to 15 by crossover
STARTING_SPACINGS = ("logsnr", "karras", "trailing", "beta")


def autodiffusion(
    problem: Problem,
    trajectory: Trajectory,
    steps: int,
    *,
    network: nn.Module | None = None,
    solver: Multistep = DDIM,
    evaluations: int = 400,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Found:
    """Search time steps and skipped layers together, for what `steps` whole network calls cost.

    AutoDiffusion (arXiv:2309.10438): a run may have more calls than its budget if they leave out layers (residual
    branches; shortcuts stay), other ones at each step. Ours minimises the distance of the samples to the converged
    solution instead of FID. What each layer is worth at each noise level is measured first and leads the mutations, and
    a predictor chooses which children are run; time steps and layers are searched together from the beginning. The
    authors count layers, we count multiply-accumulates, which is not quite what a machine needs: small layers take long
    for their size. Runs with all layers compete from the start: a network that cannot do without any keeps them.

    Args:
        problem: pairs to search on.
        trajectory: their reference.
        steps: the budget: whole network calls.
        network: U-Net or transformer behind the problem; default: `problem.network`.
        solver: deterministic multistep rule of the steps; DDIM as published.
        evaluations: budget of the search, in runs of all pairs that cost `steps` whole calls.
        seed: of mutations and of the order of the pairs.
        cache: folder that keeps errors, so that an interrupted search goes on.
        progress: show a progress bar over evaluations.

    Returns:
        The sampler, whose table may have more than `steps` calls. Notes: `skips`, names of the layers that each call
        leaves out (for `skip_layers`); `cost` of a run in whole calls; errors as `usf` has them, those of the best run
        without skips too.

    Raises:
        TypeError: for a network whose layers are not known.
        ValueError: without a network; for a budget that does not suffice to run the known samplers.
    """
    network = problem.network if network is None else network
    if network is None:
        raise ValueError("layers are skipped in a network, and this problem has none; give network=pipe.unet")
    if evaluations < 1:
        raise ValueError(f"a search needs evaluations, some hundred; not {evaluations}")
    rng = np.random.default_rng(seed)
    order, held = split_pairs(len(problem), rng)
    layers = measured(problem, trajectory, network, order[:2], progress)
    space = Skipping(problem, trajectory, network, layers, steps, solver)
    named = starting_runs(space, steps)
    file = cache_file(cache, "autodiffusion", problem, trajectory, [steps, seed, repr(solver), layers.names])
    with progress_bar(f"autodiffusion, {steps} steps", evaluations, progress) as bar:
        ledger = Ledger(space, order, evaluations, file, bar, len(problem))
        evolved = evolve(space, list(named.values()), ledger, rng, crossover=CROSSOVER)
        winner, notes = judged(space, evolved, ledger, held)
    names = {space.key(run): name for name, run in reversed(named.items())}
    whole = next((run for run in evolved.best if not any(run.skipped)), None)
    if whole is None:  # it went out early: run to its end for comparison
        plain = [run for run in named.values() if not any(run.skipped)]
        whole = min(plain, key=lambda run: float(ledger.errors(run, ledger.count(run)).mean()))
    notes |= {
        "method": "autodiffusion",
        "start": names[space.key(evolved.origin)],
        "lambdas": list(winner.lambdas),
        "skips": [[layers.names[i] for i in skipped] for skipped in winner.skipped],
        "calls": len(winner.lambdas),
        "cost": round(space.whole_calls(winner), 4),
        "shares": {name: round(float(v), 5) for name, v in zip(layers.names, layers.saves, strict=True)},
        "without_skips": summary(space.score(whole, order)),
        "seed": seed,
    }
    if not any(winner.skipped):
        notes["said_of_skips"] = "no run that leaves out layers was better than the best one with all of them"
    return Found(space.table(winner), notes)


@torch.no_grad()
def measured(
    problem: Problem, trajectory: Trajectory, network: nn.Module, rows: Sequence[int], progress: bool = False
) -> Layers:
    """What each layer costs, and what the prediction loses without it, along the reference."""
    names, pairs = tuple(skippable(network)), torch.tensor(list(rows))
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    lam = trajectory.lambdas
    levels = np.quantile(lam, (np.arange(LEVELS) + 0.5) / LEVELS)
    starts = [trajectory.at(float(level))[pairs] for level in levels]
    try:
        plain = [problem.denoise(x, float(v), rows=pairs) for x, v in zip(starts, levels, strict=True)]
    finally:
        hook.remove()
    if not calls:
        raise ValueError("the problem never calls this network; give the one behind it, such as pipe.unet")
    damage = np.zeros((len(names), LEVELS))
    for i, name in enumerate(tqdm(names, desc="layers", disable=not progress)):
        with skipping(network, [name]):
            for k, (x, level) in enumerate(zip(starts, levels, strict=True)):
                changed = problem.denoise(x, float(level), rows=pairs)
                damage[i, k] = float(np.nan_to_num(mse(changed, plain[k]).mean().item(), nan=1e6, posinf=1e6))
    saves = shares(network, calls[0])
    return Layers(names, np.array([saves[name] for name in names]), damage, levels)


def starting_runs(space: Skipping, steps: int) -> dict[str, Skips]:
    """Known grids with all layers, and with one or two calls more at the price of the layers that matter least."""
    schedule = space.problem.schedule
    spacings = (*STARTING_SPACINGS, *(("flow",) if schedule.path == "flow" else ()))
    found = {}
    for spacing in spacings:
        for more in (0, 1, 2):
            lambdas = time_grid(schedule, steps + more, spacing).lambdas[:-1]
            run = space.cheapened(Skips(lambdas, ((),) * len(lambdas)))
            if run is not None:
                found[f"{spacing}, {steps + more} calls"] = run
    return found
