"""Layers with fewer features: shapes only, the weights come later."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffaccel.pruning.groups import NotPrunableError
from diffaccel.pruning.parts.constant import Constant, NoFeatures

PLAIN = (nn.Linear, nn.Conv2d, nn.GroupNorm)


def plain(layer: nn.Module, name: str) -> nn.Module:
    """`layer`, if its weight is a plain one.

    Raises:
        NotPrunableError: for a layer with a LoRA around it, a quantised one, or one of another kind.
    """
    if type(layer) not in PLAIN:
        kind = f"{type(layer).__module__.split('.')[0]}'s {type(layer).__name__}"
        raise NotPrunableError(f"{name} is {kind}; prune before quantising, and fuse or unload a LoRA first")
    return layer


def resized(layer: nn.Module, *, lost_in: int = 0, lost_out: int = 0, lost_groups: int = 0) -> nn.Module:
    """A layer like `layer` with fewer features and fresh weights, on its device, in its dtype.

    Without any: not a layer with an empty weight, which quantisers stumble over.
    """
    if isinstance(layer, nn.GroupNorm):
        groups, channels = layer.num_groups - lost_groups, layer.num_channels - lost_out
        return nn.GroupNorm(groups, channels, layer.eps, layer.affine, **_like(layer.weight))
    bias = layer.bias is not None  # type: ignore[attr-defined]
    if isinstance(layer, nn.Linear):
        if layer.out_features == lost_out:
            return NoFeatures()
        if layer.in_features == lost_in:
            return Constant(layer)
        return nn.Linear(layer.in_features - lost_in, layer.out_features - lost_out, bias, **_like(layer.weight))
    assert isinstance(layer, nn.Conv2d)
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    channels = (layer.in_channels - lost_in, layer.out_channels - lost_out)
    return nn.Conv2d(*channels, *geometry, bias, layer.padding_mode, **_like(layer.weight))  # type: ignore[arg-type]


def _like(weight: Any) -> dict[str, Any]:
    return {"device": weight.device, "dtype": weight.dtype}
