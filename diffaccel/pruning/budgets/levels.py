"""Budgets by a level: everything below goes. Both the uniform share and the global ranking are found this way."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from diffaccel.pruning.budgets.tree import Floats, Node, saving


def up_to_level(nodes: Sequence[Node], levels: Sequence[Floats], needed: float) -> tuple[list[int], list[int]]:
    """Options of the nodes just below and at the lowest level that saves `needed`, found by bisection.

    A node takes the last of its options whose level is reached. More goes at every higher level, and savings rise with
    it, unless a depth group saves less than all that is inside it, by the noise of latencies: then they fall where it
    goes. A level that saves `needed` is found if there is one, but there may be a lower one.

    Args:
        nodes: the tree.
        levels: of each node (options,), ascending; option 0 is taken below the level of option 1.
        needed: what must be saved.

    Returns:
        One option per node, twice; those around the level that saves most, if none saves `needed`.
    """
    every = np.unique(np.concatenate([[-np.inf], *(level[1:] for level in levels)]))  # nothing goes at the first

    def at(i: int) -> list[int]:
        return [int(np.searchsorted(level[1:], every[i], side="right")) for level in levels]

    # Savings can only have a maximum at the last level and just below those where something goes with all inside it.
    holders = [i for i, node in enumerate(nodes) if node.end > i + 1 and len(levels[i]) > 1]
    peaks = [len(every) - 1, *(int(np.searchsorted(every, levels[i][1])) - 1 for i in holders)]
    top = max(peaks, key=lambda i: saving(nodes, at(i)))
    lowest = bisect_left(range(top), True, key=lambda i: saving(nodes, at(i)) >= needed)
    return at(max(lowest - 1, 0)), at(lowest)
