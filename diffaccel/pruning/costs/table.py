"""What every group costs at every width, and what a network costs after some units are gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffaccel.pruning.groups import Group


@dataclass(frozen=True)
class Costs:
    """Costs of a network and of its groups.

    Attributes:
        measure: "macs" (multiply-accumulates), "parameters" or "latency" (seconds).
        total: of the whole network, for one call.
        kept: by group name, (units + 1,) float64: cost of the group's own part when 0, 1, ... all units are kept. Only
            differences matter: `kept[name][-1] - kept[name][k]` is saved by keeping k units. A group of depth has two
            entries, 0 and all that is in its modules, other groups in there included.
    """

    measure: str
    total: float
    kept: dict[str, NDArray[np.float64]]


def planned(costs: Costs, groups: Sequence[Group], removed: Mapping[str, Sequence[int]]) -> float:
    """Cost of the network without the removed units.

    Units inside a module that is removed whole save nothing more.

    Args:
        costs: of the network.
        groups: at least those that are named in `removed`.
        removed: removed units by group name.

    Raises:
        ValueError: if a group is not among `groups` or not in `costs`, or a unit is not there or named twice.
    """
    by_name = {group.name: group for group in groups}
    for name, units in removed.items():
        if name not in by_name or name not in costs.kept:
            raise ValueError(f"no group {name!r} with a cost; give the groups that the costs were made of")
        count = by_name[name].units
        if len(set(units)) != len(units) or any(not 0 <= unit < count for unit in units):
            raise ValueError(f"group {name!r} has units 0 to {count - 1}, each removed once; not {list(units)}")
    gone = [by_name[name] for name, units in removed.items() if units]
    whole = [group for group in gone if len(removed[group.name]) == group.units]
    outermost = [group for group in gone if not any(outer.contains(group) for outer in whole)]
    return costs.total - sum(_saved(costs, group, len(removed[group.name])) for group in outermost)


def _saved(costs: Costs, group: Group, count: int) -> float:
    kept = costs.kept[group.name]
    return float(kept[-1] - kept[group.units - count])
