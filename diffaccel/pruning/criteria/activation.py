"""Activation: the energy that a unit sends on, weights and inputs together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from diffaccel.pruning.calibration import Calibration
from diffaccel.pruning.criteria.energy import Moments, change_energy, moments, unit_energy
from diffaccel.pruning.criteria.scores import Scores, check
from diffaccel.pruning.groups import Group


def activation(model: nn.Module, groups: Sequence[Group], calibration: Calibration) -> Scores:
    """Energy of what a unit adds to the output of its layer: sum over its features j of E[x_j^2] ||W_:j||^2.

    Wanda's |W_ij| ||x_j|| (arXiv:2306.11695), squared and summed over the weights of a unit, and over positions
    (tokens, pixels); E is the mean over the calls and their rows. It is the squared error of the layer without the
    unit as long as features are uncorrelated. A convolution's column is all of its kernel. A body of a ResNet is the
    one unit of its site; of other depths the energy of the change counts, E||f(x) - x||^2 summed over the modules and,
    in joint blocks, over picture and text: the same currency, since residual connections add both to the stream.

    The sum over positions, not their mean, makes stages of a U-Net comparable. What happens to the energy on its way to
    the network's output, the gates of adaptive norms among it, is not seen.

    Raises:
        ValueError: if a score is not finite, or a module for depth has no residual connection.
    """
    inputs, changes = moments(model, groups, calibration), change_energy(model, groups, calibration)
    return check(
        {
            group.name: unit_energy(model, group, inputs, _square) if group.sites else np.array([changes[group.name]])
            for group in groups
        }
    )


def _square(layer: nn.Module, x: Moments) -> Tensor:
    return x.square
