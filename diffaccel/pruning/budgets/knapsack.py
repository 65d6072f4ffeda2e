"""Knapsack: the smallest sum of removed scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffaccel.pruning.budgets.put_back import put_back
from diffaccel.pruning.budgets.ranking import price
from diffaccel.pruning.budgets.tree import Floats, Node

LIMIT = 4096  # plans kept of each front; see `_best`


class Front(NamedTuple):
    """Plans for one node of the tree and all behind it, none of which saves more for less score than another.

    Attributes:
        saved: (plans,) savings, ascending.
        score: (plans,) sum of removed scores, ascending.
        option: (plans,) option of this node.
        rest: (plans,) place of the rest of the plan in the front of the node that comes next.
    """

    saved: Floats
    score: Floats
    option: NDArray[np.int16]
    rest: NDArray[np.int32]


def knapsack(nodes: Sequence[Node], needed: float) -> list[int]:
    """Option of each node with the least sum of removed scores among all plans that save `needed`.

    Scores are taken as losses that add up, as in LAPTOP-Diff (arXiv:2404.11098), which removes whole layers; here every
    group is one of several choices (multiple-choice knapsack), savings need not be linear in the units, and a depth
    group is an alternative to everything inside it. Dynamic programming over the tree from its end: a node that goes as
    a whole continues behind its subtree, any other with the next node (Johnson and Niemi, 1983).

    Plans carry their true savings, nothing is rounded: what is returned does save `needed`. It is optimal as long as no
    front has more than `LIMIT` plans; on SD1.5, SDXL and Flux (up to 330 groups, random scores) eight times the limit
    lowered the sum by 0.1 % at most.

    Returns:
        One option per node; those that save most, if nothing saves `needed`.
    """
    slope = price(nodes, needed)
    fronts = [Front(np.zeros(1), np.zeros(1), np.zeros(1, np.int16), np.zeros(1, np.int32))]
    for i in range(len(nodes) - 1, -1, -1):  # fronts[-1 - i] belongs to the node i
        behind = fronts[len(nodes) - nodes[i].end]
        fronts.append(_front(nodes[i], fronts[-1], behind, needed, slope))
    fronts.reverse()
    return put_back(nodes, _trace(nodes, fronts), needed)


def _front(node: Node, following: Front, behind: Front, needed: float, slope: float) -> Front:
    rests = [following] + [behind] * (len(node.counts) - 1)  # the same for width, which has nothing inside
    sizes = [len(rest.saved) for rest in rests]
    saved = np.concatenate([rest.saved + more for rest, more in zip(rests, node.saved, strict=True)])
    score = np.concatenate([rest.score + more for rest, more in zip(rests, node.score, strict=True)])
    best = _best(saved, score, needed, slope)
    option = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
    rest = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    return Front(saved[best], score[best], option[best], rest[best])


def _best(saved: Floats, score: Floats, needed: float, slope: float) -> NDArray[np.intp]:
    """Indexes of the plans that no other beats, savings ascending; at most about `LIMIT` of them.

    Savings above `needed` are worth no more than `needed`. If there are more plans, each of `LIMIT` equal intervals of
    savings keeps one: the lowest score less `slope` times the savings. The bare score would always favour the lower end
    of the interval, and what is lost there adds up over the nodes; with the score per cost that the whole network pays
    in the end, plans of one interval compare fairly. The plan that saves most always stays, so that what can be
    reached at all is found.
    """
    worth = np.minimum(saved, needed)
    plans = np.arange(len(saved))
    if len(plans) > LIMIT:
        cell = np.where(saved < needed, worth * (LIMIT / needed), LIMIT + 1).astype(np.intp)
        value = score - slope * worth
        least = np.full(LIMIT + 2, np.inf)
        np.minimum.at(least, cell, value)
        plans = np.flatnonzero((value == least[cell]) | (plans == np.argmax(saved)))
    plans = plans[np.lexsort((saved[plans], score[plans], -worth[plans]))]  # most savings first, then lowest score
    lowest = np.minimum.accumulate(score[plans])
    return plans[np.append(True, score[plans][1:] < lowest[:-1])][::-1]


def _trace(nodes: Sequence[Node], fronts: Sequence[Front]) -> list[int]:
    picks = [0] * len(nodes)
    i, plan = 0, -1  # the last plan of the first front: the cheapest that saves `needed`, or what saves most
    while i < len(nodes):
        picks[i] = int(fronts[i].option[plan])
        plan = int(fronts[i].rest[plan])
        i = nodes[i].end if picks[i] else i + 1
    return picks
