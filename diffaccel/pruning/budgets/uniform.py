"""Uniform: every place loses the same share."""

from __future__ import annotations

from collections.abc import Sequence

from diffaccel.pruning.budgets.levels import up_to_level
from diffaccel.pruning.budgets.tree import Floats, Node, saving
from diffaccel.pruning.groups import DEPTH


def uniform(nodes: Sequence[Node], needed: float) -> list[int]:
    """Option of each node: the smallest share that saves `needed`, the same for every width group and depth kind.

    A width group loses its lowest-scored units, a depth kind its lowest-scored blocks. No place loses more than the
    share: counts are rounded down to whole steps, a place of few units falls behind until a whole one is due, and
    nothing but blocks goes entirely before the share is 1. What is inside a block that goes needs no share of its own.

    Many places may be due for their next step at the same share, as all attentions with 8 heads are. Those that are
    not needed for the target keep it, the most expensive first.
    """
    ranks = _ranks(nodes)
    shares = [ranks.get(node.group.name, node.counts / node.group.units) for node in nodes]
    before, picks = up_to_level(nodes, shares, needed)
    if saving(nodes, picks) < needed:
        return picks  # out of reach
    due = [i for i in range(len(nodes)) if before[i] != picks[i]]
    for i in sorted(due, key=lambda i: nodes[i].saved[before[i]] - nodes[i].saved[picks[i]]):
        fewer = [*picks[:i], before[i], *picks[i + 1 :]]
        if saving(nodes, fewer) >= needed:
            picks = fewer
    return picks


def _ranks(nodes: Sequence[Node]) -> dict[str, Floats]:
    """Share of its kind that has gone once a block goes, as the levels of its two options."""
    ranks = {}
    for kind in DEPTH:
        blocks = [node for node in nodes if node.group.kind == kind and len(node.counts) > 1]
        blocks.sort(key=lambda node: node.score[-1])
        for place, node in enumerate(blocks, start=1):
            ranks[node.group.name] = node.counts * (place / len(blocks))
    return ranks
