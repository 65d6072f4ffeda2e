"""Evenly spaced: what is kept is spread over the network, whatever the number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffaccel.pruning.criteria.scores import Scores
from diffaccel.pruning.groups import WIDTH, Group


def evenly_spaced(model: nn.Module, groups: Sequence[Group]) -> Scores:
    """Scores in (0, 1] that keep every second unit, every fourth, ...: widths within their group, depths within a kind.

    Depths of a kind are counted in the order given, that of the network. Half of them gone, the first, third, fifth,
    ... are left, as in BK-SDM (arXiv:2305.15798); on DiT-XL/2 that beat every ranking of blocks by similarity or loss
    (TinyFusion, arXiv:2412.01199). One ranking serves every number: the order is bit reversal (van der Corput), even
    at powers of two and within a factor of two between them.
    """
    scores = {group.name: _spread(group.units) for group in groups if group.kind in WIDTH}
    for kind in {group.kind: None for group in groups if group.kind not in WIDTH}:
        names = [group.name for group in groups if group.kind == kind]
        scores |= {name: np.array([score]) for name, score in zip(names, _spread(len(names)), strict=True)}
    return {group.name: scores[group.name] for group in groups}


def _spread(n: int) -> NDArray[np.float64]:
    """(n,) scores, 1 for the first place, such that the best k are spread evenly for every k."""
    bits = max(n - 1, 0).bit_length()
    reverse = [int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(2**bits)]
    order = [place for place in reverse if place < n]
    scores = np.empty(n)
    scores[order] = 1 - np.arange(n) / max(n, 1)
    return scores
