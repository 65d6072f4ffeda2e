"""Depth: which blocks of a network can be left out, and the config of the stock class that has no such blocks."""

from __future__ import annotations

from types import ModuleType

import diffusers
from torch import nn

from diffaccel.pruning.families import transformer, unet

FAMILIES: dict[type, ModuleType] = {
    diffusers.UNet2DModel: unet,
    diffusers.UNet2DConditionModel: unet,
    diffusers.DiTTransformer2DModel: transformer,
    diffusers.PixArtTransformer2DModel: transformer,
    diffusers.SD3Transformer2DModel: transformer,
    diffusers.FluxTransformer2DModel: transformer,
}


def stock_class(model: nn.Module | type) -> type:
    """The class of Diffusers that a network, or a pruned one, belongs to.

    Raises:
        TypeError: if it is none that can be pruned.
    """
    kind = model if isinstance(model, type) else type(model)
    for stock in FAMILIES:
        if kind is stock or getattr(kind, "stock", None) is stock:
            return stock
    if kind.__name__ == "OptimizedModule":
        raise TypeError("cannot prune what torch.compile returned; give the network itself, and compile the result")
    known = ", ".join(stock.__name__ for stock in FAMILIES)
    raise TypeError(f"cannot prune a {kind.__name__}; known are {known}")


def family_of(model: nn.Module | type) -> ModuleType:
    """The module of this folder that knows a network.

    Raises:
        TypeError: see `stock_class`.
    """
    return FAMILIES[stock_class(model)]
