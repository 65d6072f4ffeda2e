"""Pruning from end to end: groups, scores, costs and a budget make a plan; the plan is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

import diffaccel
from diffaccel.cost import denoisers, macs, parameters
from diffaccel.meta import meta_copy, to_meta
from diffaccel.pruning.budgets.allocation import METHODS, allocate
from diffaccel.pruning.calibration import Calibration
from diffaccel.pruning.costs import Costs, latency_costs, macs_costs, parameter_costs, planned
from diffaccel.pruning.criteria import CALIBRATED, CRITERIA, Scores, means, score
from diffaccel.pruning.families.transformer import LENGTHS
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.gates import Fill
from diffaccel.pruning.groups import DEPTH, WIDTH, Group
from diffaccel.pruning.inputs import example_inputs
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.surgery import cut

COSTS = ("macs", "parameters", "latency")


@dataclass(frozen=True)
class Proposal:
    """A plan that is not cut yet.

    Attributes:
        plan: what is to be removed; `plan.facts` says how it was chosen, and what it is expected to save.
        fill: means that stand for what is removed (FLAP), for `mask` and `cut`; empty for other criteria.
        costs: costs the plan was made with; of MACs and parameters those of all groups of the network.
        groups: groups that could have been removed.
    """

    plan: PruningPlan
    fill: Fill
    costs: Costs
    groups: list[Group]


@dataclass(frozen=True)
class Pruned:
    """A smaller network.

    Attributes:
        model: of the stock class if its config can say the shapes, else of its subclass `Pruned...`.
        plan: what was removed.
        macs: multiply-accumulates of one call before and after, attention counted.
        parameters: before and after.
    """

    model: Any
    plan: PruningPlan
    macs: tuple[int, int]
    parameters: tuple[int, int]


def prune(network: Any, target: float, **options: Any) -> Pruned:
    """A network with `target` of the cost; the one that is given is left as it is.

    `pipe.unet = diffaccel.prune(pipe, 0.7).model`. Pictures suffer: without recovery (a distillation that follows) take
    15 % away rather than 50 %, and look at them.

    Args:
        network: a network, or a pipeline, whose denoiser is meant; classes of `find_groups`.
        target: share of the cost to keep, in (0, 1].
        options: see `propose`.

    Raises:
        TypeError: for a network of another class.
        ValueError: see `propose`.
    """
    model = _denoiser(network)
    proposal = propose(model, target, **options)
    inputs = options.get("inputs") or example_inputs(model)
    smaller = cut(model, proposal.plan, proposal.fill)
    return Pruned(
        smaller,
        proposal.plan,
        (count_macs(model, inputs), count_macs(smaller, inputs)),
        (parameters(model), parameters(smaller)),
    )


def propose(
    network: Any,
    target: float,
    *,
    criterion: str = "magnitude",
    budget: str = "knapsack",
    cost: str = "macs",
    kinds: Sequence[str] = WIDTH,
    calibration: Calibration | None = None,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
    scores: Scores | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Proposal:
    """Choose what to remove, and remove nothing yet.

    Args:
        network: a network, or a pipeline, whose denoiser is meant.
        target: share of the cost to keep, in (0, 1].
        criterion: which units matter least: "magnitude", "random", "evenly_spaced", "taylor", "activation", "flap".
        budget: how the removal is shared out: "uniform", "global", "knapsack" (see `allocate`).
        cost: what is counted: "macs" (attention included), "parameters", or "latency", measured here and now on the
            device and in the type of the network.
        kinds: kinds of groups to remove from: of width ("heads", "neurons", "channels"), of depth ("block", "layer",
            "transformer", "resnet", "mid_block"), or both. The first block of a transformer stays if no other has to.
        calibration: calls of the network (`record`, `random_calls`), for the criteria that look at activations.
        inputs: arguments of a call of the network, for the costs; default: one sample of the size in its config.
        seed: of "random" and "taylor".
        scores: what `score` returned for this criterion, to try several targets; default: they are made.
        facts: what else the plan is to tell.

    Raises:
        TypeError: for a network of another class.
        ValueError: for an unknown name, a target that cannot be reached, or a missing calibration.
    """
    model = _denoiser(network)
    names = {"criterion": (criterion, CRITERIA), "budget": (budget, tuple(METHODS)), "cost": (cost, COSTS)}
    for what, (name, known) in names.items():
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; use {', '.join(known)}")
    groups = _chosen(model, kinds)
    inputs = inputs or example_inputs(model)
    counted = _costs(cost, model, groups, inputs)
    if criterion in CALIBRATED and scores is None:  # they take a while: can the target be reached at all?
        equal = {group.name: np.ones(group.units) for group in groups}
        allocate(groups, equal, counted, target, budget)  # type: ignore[arg-type]
    scores = scores or score(criterion, model, groups, calibration, seed=seed)
    removed = allocate(groups, scores, counted, target, budget)  # type: ignore[arg-type]
    if not removed:
        raise ValueError(f"a target of {target} removes nothing; choose a lower one")
    chosen = {
        "criterion": criterion,
        "budget": budget,
        "cost": cost,
        "target": target,
        "planned": planned(counted, groups, removed) / counted.total,
        "kinds": list(kinds),
        "diffaccel": diffaccel.__version__,
    }
    if criterion in CALIBRATED and calibration:
        chosen |= {"calls": len(calibration.calls), "calls_from": calibration.source}
    losing = [group for group in groups if group.name in removed and group.sites]
    fill = means(model, losing, calibration) if criterion == "flap" and calibration and losing else {}
    return Proposal(PruningPlan.of(model, removed, chosen | dict(facts or {})), fill, counted, groups)


def count_macs(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Multiply-accumulates of `model(**inputs)`, counted on the `meta` device: nothing is computed."""
    return macs(meta_copy(model), **to_meta(dict(inputs)))


def _costs(cost: str, model: nn.Module, groups: list[Group], inputs: Mapping[str, Any]) -> Costs:
    if cost == "latency":
        return latency_costs(model, groups, inputs)
    everything = list(find_groups(model).found.values())
    return macs_costs(model, everything, inputs) if cost == "macs" else parameter_costs(model, everything)


def _chosen(model: nn.Module, kinds: Sequence[str]) -> list[Group]:
    if isinstance(kinds, str) or not kinds:
        raise ValueError(f"kinds is a list of {', '.join(WIDTH + DEPTH)}, not {kinds!r}")
    groups = find_groups(model)
    if chosen := _but_one_block(model, groups.of(*kinds)):
        return chosen
    there = sorted({group.kind for group in groups.found.values()})
    raise ValueError(f"a {type(model).__name__} has no {' or '.join(kinds)} to remove; it has {', '.join(there)}")


def _but_one_block(model: nn.Module, groups: list[Group]) -> list[Group]:
    """`groups` without the first block of a transformer, if they have every block: one must stay."""
    blocks = [group.name for group in groups if group.kind == "block" and group.name.count(".") == 1]
    total = sum(len(getattr(model, name, ())) for name in LENGTHS)
    first = blocks[0] if blocks and len(blocks) == total else None
    return [group for group in groups if group.name != first]


def _denoiser(network: Any) -> nn.Module:
    if isinstance(network, nn.Module):
        return network
    found = denoisers(network)
    if len(found) > 1:
        raise ValueError(f"{type(network).__name__} has several denoisers ({', '.join(found)}); pass one of them")
    return next(iter(found.values()))
