"""A network that computes only its first layers: which depths there are, and the view of each."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import diffusers
from torch import nn

from diffaccel.pruning.families import family_of as pruning_family
from diffaccel.pruning.families import stock_class
from diffaccel.pruning.families import unet as unet_family
from diffaccel.samplers.policy.exits import transformer, unet


def exits_of(model: nn.Module) -> ModuleType:
    """What knows the exits of a network: this folder's `transformer` or `unet`.

    Raises:
        TypeError: for a network of another class.
    """
    try:
        stock_class(model)
    except TypeError as error:
        raise TypeError(str(error).replace("prune", "leave early")) from None
    return unet if pruning_family(model) is unet_family else transformer


def layers(model: nn.Module) -> int:
    """Depth of the whole network: blocks of a transformer (of both lists for Flux), levels of a U-Net.

    Raises:
        TypeError: for a network of another class.
    """
    return exits_of(model).layers(model)


def told_scale(model: nn.Module) -> float:
    """What a scheduler's timesteps are multiplied by before the network is told: Flux is told sigma."""
    return 1e-3 if stock_class(model) is diffusers.FluxTransformer2DModel else 1.0


def shallow(model: nn.Module, depth: int, exit_map: nn.Module | None = None) -> Any:
    """A view of a network that leaves at `depth`, sharing all weights with it.

    A transformer computes its first `depth` blocks and then its head, as ASE does (arXiv:2408.05927).
    A U-Net computes its `depth` outer levels; inside, ResNets are their shortcuts. With a map the features at the exit
    go through it, and in a U-Net nothing inside is computed at all.

    Args:
        model: DiT, PixArt, SD3, Flux, or a U-Net.
        depth: from 1 to `layers(model)`, which is the whole network.
        exit_map: see `LinearExit`; it is moved to the network's device.

    Raises:
        TypeError: for a network of another class.
        ValueError: for another depth.
    """
    family = exits_of(model)
    if not 1 <= depth <= family.layers(model):
        raise ValueError(f"a {type(model).__name__} has depths 1 to {family.layers(model)} here, not {depth}")
    if depth == family.layers(model):
        return model
    home = next(model.parameters()).device
    if exit_map is not None and home.type != "meta":  # offloaded weights are not anywhere
        exit_map.to(home)
    return family.shallow(model, depth, exit_map)
