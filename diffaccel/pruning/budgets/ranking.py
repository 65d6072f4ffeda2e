"""Global: one ranking of everything that can go, by score per cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from diffaccel.pruning.budgets.levels import up_to_level
from diffaccel.pruning.budgets.put_back import put_back
from diffaccel.pruning.budgets.tree import Floats, Node


def ranking(nodes: Sequence[Node], needed: float) -> list[int]:
    """Option of each node when the lowest score per cost saved goes first, until `needed` is saved.

    Published global rankings compare bare scores, which a unit of one kind then wins by its size alone: a head has a
    hundred times the weights, and the score, of a neuron. Per cost saved they compare, heads with blocks too, and the
    order is the greedy one of the knapsack problem (Dantzig, 1957). Where savings are not linear (latency), steps are
    ranked by the slope of the lower convex hull of score over savings (Sinha and Zoltners, 1979), so that a step that
    saves little does not hide the one behind it. A depth group has one rank, by its score and all that it saves,
    whatever has gone inside it before.

    The last one to go may save far more than was missing: what then need not go is put back.
    """
    slopes = [_hull_slopes(node.saved, node.score) for node in nodes]
    _, picks = up_to_level(nodes, slopes, needed)
    return put_back(nodes, picks, needed)


def price(nodes: Sequence[Node], needed: float) -> float:
    """Score per cost of the last that goes when `needed` is saved; 0 if nothing can go."""
    slopes = [_hull_slopes(node.saved, node.score) for node in nodes]
    _, picks = up_to_level(nodes, slopes, needed)
    return float(max(slope[pick] for slope, pick in zip(slopes, picks, strict=True)))


def _hull_slopes(saved: Floats, score: Floats) -> Floats:
    """(options,) slope of the lower convex hull of the points (saved, score) that ends at or passes over each."""
    corners = [0]

    def slope(i: int, j: int) -> float:
        return (score[j] - score[i]) / (saved[j] - saved[i])

    for j in range(1, len(saved)):
        while len(corners) > 1 and slope(corners[-2], corners[-1]) > slope(corners[-1], j):
            corners.pop()
        corners.append(j)
    slopes = np.zeros(len(saved))
    for i, j in pairwise(corners):
        slopes[i + 1 : j + 1] = slope(i, j)
    return slopes
