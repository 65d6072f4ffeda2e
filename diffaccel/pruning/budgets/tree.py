"""Groups as a tree: what may be taken from each, and what that saves when one group holds another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffaccel.pruning.groups import DEPTH, Group

if TYPE_CHECKING:
    from diffaccel.pruning.costs.table import Costs

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Node:
    """A group and its options: option 0 takes nothing, every further one takes more units, lowest scores first.

    Counts are multiples of `Group.step`, the last one all units. A count that saves no more than a smaller one is no
    option: a latency table may be flat or noisy, and units whose removal saves nothing stay.

    Attributes:
        group: the group.
        order: all units, lowest score first; of equal scores the lower index first.
        counts: (options,) units taken.
        saved: (options,) what that saves, ascending from 0, in the unit of the costs.
        score: (options,) sum of the scores of the units taken.
        end: index of the first node of the tree behind this one and everything inside it.
    """

    group: Group
    order: tuple[int, ...]
    counts: NDArray[np.int64]
    saved: Floats
    score: Floats
    end: int


def tree(groups: Sequence[Group], scores: dict[str, Floats], costs: Costs) -> list[Node]:
    """Groups as nodes, every depth group directly followed by all that is inside it (pre-order).

    Raises:
        ValueError: if a depth group shares modules with another group and neither holds the other: what they save
            together is not known then.
    """
    _check_overlaps(groups)
    chains = _chains(groups)
    order = sorted(range(len(groups)), key=lambda i: (*chains[i], i))  # a prefix sorts before what it begins
    nodes = []
    for place, i in enumerate(order):
        inside = sum(i in chain for chain in chains)
        group = groups[i]
        nodes.append(_node(group, scores[group.name], costs.kept[group.name], place + 1 + inside))
    return nodes


def taking(nodes: Sequence[Node], picks: Sequence[int]) -> Iterator[int]:
    """Indexes of the nodes that take something, but none inside a depth group that goes as a whole."""
    i = 0
    while i < len(nodes):
        if picks[i]:
            yield i
        i = nodes[i].end if picks[i] else i + 1


def saving(nodes: Sequence[Node], picks: Sequence[int]) -> float:
    """What the options `picks`, one of each node, save together."""
    return float(sum(nodes[i].saved[picks[i]] for i in taking(nodes, picks)))


def removed(nodes: Sequence[Node], picks: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Units that go, ascending, by the name of the group; groups that lose nothing of their own are left out."""
    taken = ((nodes[i], int(nodes[i].counts[picks[i]])) for i in taking(nodes, picks))
    return {node.group.name: tuple(sorted(node.order[:count])) for node, count in taken}


def _node(group: Group, scores: Floats, kept: Floats, end: int) -> Node:
    scores, kept = np.asarray(scores, dtype=np.float64), np.asarray(kept, dtype=np.float64)
    order = np.argsort(scores, kind="stable")
    counts = np.append(np.arange(0, group.units, group.step), group.units)
    saved = (kept[-1] - kept[::-1])[counts]  # kept[::-1][n]: the cost without n units
    new = np.append(True, saved[1:] > np.maximum.accumulate(saved)[:-1])
    counts, saved = counts[new], saved[new]
    score = np.append(0.0, np.cumsum(scores[order]))[counts]
    return Node(group, tuple(order.tolist()), counts, saved, score, end)


def _chains(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """Indexes of the depth groups around each group, outermost first; they are one inside the other.

    Two that were not would share a module of the group, which `_check_overlaps` refuses.
    """
    depth = [i for i, group in enumerate(groups) if group.kind in DEPTH]
    around = [[i for i in depth if _holds(groups, i, j)] for j in range(len(groups))]
    return [tuple(sorted(outer, key=lambda i: len(around[i]))) for outer in around]


def _holds(groups: Sequence[Group], i: int, j: int) -> bool:
    # Of two depth groups with the same modules the first counts as the outer one.
    return groups[i].contains(groups[j]) and not (j < i and groups[j].contains(groups[i]))


def _check_overlaps(groups: Sequence[Group]) -> None:
    owners: dict[str, list[Group]] = {}
    for group in groups:
        for module in group.modules:
            owners.setdefault(module, []).append(group)
    for group in groups:
        for outer in {name: None for module in group.modules for name in _upwards(module)}:
            for other in owners.get(outer, []):
                held = other is group or other.contains(group) or group.contains(other)
                if not held and (group.kind in DEPTH or other.kind in DEPTH):
                    raise ValueError(
                        f"{group.name} and {other.name} share {outer}, but neither holds the other; allow one of them"
                    )


def _upwards(module: str) -> list[str]:
    """A module's name and those of all that it is inside of."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
