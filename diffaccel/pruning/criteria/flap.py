"""FLAP: how much a unit's contribution fluctuates; its mean is put into the bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffaccel.pruning.calibration import Calibration
from diffaccel.pruning.criteria.energy import Moments, change_energy, moments, unit_energy
from diffaccel.pruning.criteria.scores import Scores, check
from diffaccel.pruning.groups import Group


def flap(model: nn.Module, groups: Sequence[Group], calibration: Calibration) -> Scores:
    """Energy that is left of a unit after its mean has gone into the bias: sum over features of Var(x_j) ||W_:j||^2.

    The fluctuation metric of FLAP (arXiv:2312.11983), to be used with `means` for the removal. Convolutions count
    with E[x_j^2] as in `activation`: a constant that goes through a padded kernel is none at the border, so that no
    bias makes up for it; so do layers without a bias. Depths are as in `activation`.

    The paper standardises scores within each layer before layers are compared. Here they are compared as they are:
    budgets add scores up, for which they must be energies.

    Raises:
        ValueError: if a score is not finite, or a module for depth has no residual connection.
    """
    inputs, changes = moments(model, groups, calibration), change_energy(model, groups, calibration)
    return check(
        {
            group.name: unit_energy(model, group, inputs, _left) if group.sites else np.array([changes[group.name]])
            for group in groups
        }
    )


def means(model: nn.Module, groups: Sequence[Group], calibration: Calibration) -> dict[str, Tensor]:
    """Mean input of every Linear with a bias that has columns of these groups: (in_features,) float32, on the CPU.

    Multiplied by the removed columns and added to the bias, they are what the removed units contributed on average
    (FLAP's baseline bias compensation): `cut(model, plan, fill)`, `mask(model, plan, fill)`.
    """
    inputs = moments(model, groups, calibration)
    return {name: x.mean.to(torch.float32) for name, x in inputs.items() if _has_bias(model.get_submodule(name))}


def _left(layer: nn.Module, x: Moments) -> Tensor:
    return x.variance if _has_bias(layer) else x.square


def _has_bias(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.bias is not None
