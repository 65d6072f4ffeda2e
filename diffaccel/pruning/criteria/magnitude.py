"""Magnitude: squared weights, the baseline that needs neither pictures nor a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from diffaccel.pruning.criteria.scores import Scores, check, per_unit
from diffaccel.pruning.groups import Group, Site

LAYERS = (nn.Linear, nn.Conv2d)


def magnitude(model: nn.Module, groups: Sequence[Group]) -> Scores:
    """Sum of the squared weights that go with a unit: rows and columns together, a group L2 norm squared.

    Matrices and kernels of convolutions count; biases, norms and embedding tables do not (a norm's gain is near 1
    whatever the unit does). For depth it is the same sum over everything in the modules, so that widths and depths are
    in one currency, the squared norm of what is removed. (The norm over all coupled weights is that of DepGraph,
    arXiv:2301.12900, which takes means where we take sums: budgets divide by the cost themselves.)
    """
    scores = {}
    for group in groups:
        if group.sites:
            scores[group.name] = np.sum([_site(model, site, group.units) for site in group.sites], axis=0)
        else:
            layers = (layer for name in group.modules for layer in model.get_submodule(name).modules())
            whole = sum(float(_squares(layer).sum()) for layer in layers if isinstance(layer, LAYERS))
            scores[group.name] = np.full(group.units, whole)
    return check(scores)


def _squares(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """(out, in) sums of squared weights over the kernel; float16 would overflow."""
    squares = layer.weight.detach().float().square()
    return squares.flatten(2).sum(2) if squares.ndim > 2 else squares


def _site(model: nn.Module, site: Site, units: int) -> NDArray[np.float64]:
    layer = model.get_submodule(site.module)
    if not isinstance(layer, LAYERS):
        return np.zeros(units)
    return per_unit(_squares(layer).sum(1 if site.side == "out" else 0), site, units)
