"""What more was removed than had to be comes back."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from diffaccel.pruning.budgets.tree import Node, saving, taking


def put_back(nodes: Sequence[Node], picks: Sequence[int], needed: float) -> list[int]:
    """`picks` less every last step that `needed` does not require, the highest score first.

    Picks inside a depth group that goes become 0, and stay so if the group comes back.
    """
    kept = [0] * len(nodes)
    for i in taking(nodes, picks):
        kept[i] = picks[i]
    spare = saving(nodes, kept) - needed
    queue = [_last_step(nodes[i], kept[i], i) for i in taking(nodes, kept)]
    heapq.heapify(queue)
    while queue:
        _, i, cost = heapq.heappop(queue)
        if cost > spare:
            continue  # nor will it fit later: the spare only shrinks
        spare -= cost
        kept[i] -= 1
        if kept[i]:
            heapq.heappush(queue, _last_step(nodes[i], kept[i], i))
    return kept


def _last_step(node: Node, pick: int, i: int) -> tuple[float, int, float]:
    score, saved = node.score[pick - 1 : pick + 1], node.saved[pick - 1 : pick + 1]
    return float(score[0] - score[1]), i, float(saved[1] - saved[0])
