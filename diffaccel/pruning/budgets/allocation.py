"""Which units go: groups, scores and costs in, units out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from diffaccel.pruning.budgets.knapsack import knapsack
from diffaccel.pruning.budgets.ranking import ranking
from diffaccel.pruning.budgets.tree import Floats, removed, saving, tree
from diffaccel.pruning.budgets.uniform import uniform
from diffaccel.pruning.groups import Group

if TYPE_CHECKING:
    from diffaccel.pruning.costs.table import Costs

METHODS = {"uniform": uniform, "global": ranking, "knapsack": knapsack}
ROUNDING = 1e-12  # of the total: sums of the same costs in another order differ by this much


def allocate(
    groups: Sequence[Group],
    scores: dict[str, Floats],
    costs: Costs,
    target: float,
    method: Literal["uniform", "global", "knapsack"] = "knapsack",
) -> dict[str, tuple[int, ...]]:
    """Units to remove so that the network costs at most `target` of what it did.

    Units go in multiples of `Group.step`, lowest scores first; the last step of a group may take all of it. What is
    inside a depth group that goes is not listed. Units whose removal saves nothing stay.

    - "uniform": the same share of every width group and of every kind of depth. Needs no comparable scores.
    - "global": lowest score per cost first, over all groups.
    - "knapsack": the least sum of removed scores: the optimum of what "global" approaches. Seconds for a large network.

    "global" and "knapsack" compare scores of different groups and add them up: they must be losses, on one scale.

    Args:
        groups: what may be removed; leave out what must stay.
        scores: of each group's units (units,), higher = keep. Those of other groups are ignored.
        costs: what each group costs, by units kept.
        target: share of the whole network's cost to keep, in (0, 1]; 1 removes nothing.
        method: how the removal is shared out.

    Returns:
        Units to remove, ascending, by name of the group, in the order of `groups`; groups that lose nothing of
        their own are left out. The cost is at most `target * costs.total`, up to rounding (1e-12 of the total).

    Raises:
        ValueError: if the target is not in (0, 1] or cannot be reached (the message tells the lowest share that can),
            there are no groups, two have one name or cross each other, scores or costs are missing or unsuitable.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use {', '.join(map(repr, METHODS))}")
    if not 0 < target <= 1:
        raise ValueError(f"the target is the share of the cost to keep, in (0, 1], not {target}; 0.7 keeps 70 %")
    _check(groups, scores, costs)
    if method != "uniform":
        _check_losses(groups, scores, method)
    nodes = tree(groups, scores, costs)
    needed = costs.total * (1 - target - ROUNDING)
    if needed <= 0:
        return {}
    picks = METHODS[method](nodes, needed)
    if (saved := saving(nodes, picks)) < needed:
        lowest = math.ceil((1 - saved / costs.total) * 1e4) / 1e4  # up: the number in the message must work
        raise ValueError(
            f"these groups bring the {costs.measure} down to {lowest:.4f} of the network's at best, not to {target:g}; "
            "raise the target or allow more kinds of groups"
        )
    plan = removed(nodes, picks)
    return {group.name: plan[group.name] for group in groups if group.name in plan}


def _check(groups: Sequence[Group], scores: dict[str, Floats], costs: Costs) -> None:
    if not groups:
        raise ValueError("there are no groups to remove units from; find_groups(model).of(kind, ...) gives them")
    if not (math.isfinite(costs.total) and costs.total > 0):
        raise ValueError(f"the network's {costs.measure} must be positive, not {costs.total}")
    names = [group.name for group in groups]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"group {twice[0]!r} is given twice; names must be unique")
    for group in groups:
        for table, length, what in ((scores, group.units, "scores"), (costs.kept, group.units + 1, "costs")):
            if group.name not in table:
                raise ValueError(f"{what} of {group.name} are missing; give {length} numbers")
            values = np.asarray(table[group.name])
            if values.shape != (length,) or not np.isfinite(values).all():
                raise ValueError(f"{what} of {group.name} must be {length} finite numbers, not {_told(values)}")


def _told(values: np.ndarray) -> str:
    return f"shape {values.shape}" if np.isfinite(values).all() else "NaN or inf"


def _check_losses(groups: Sequence[Group], scores: dict[str, Floats], method: str) -> None:
    for group in groups:
        if np.min(scores[group.name]) < 0:
            raise ValueError(
                f"scores of {group.name} are negative, but {method!r} adds scores up as losses, which are 0 or more; "
                "clip them at 0, or use 'uniform', which only compares units of one place"
            )
