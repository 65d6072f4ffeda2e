"""What is left of a module without units: the constant that it adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """The bias of a layer that has no input any more, in the place and under the name of that layer.

    Not the identity, and not nothing: a layer whose inputs are all zero returns its bias.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.features = layer.weight.shape[0]
        self.spatial = isinstance(layer, nn.Conv2d)
        self.register_parameter("bias", None if layer.bias is None else nn.Parameter(torch.empty_like(layer.bias)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, features, H, W) of a convolution, (..., C) -> (..., features) of a Linear."""
        if self.spatial:
            n, _, h, w = hidden_states.shape
            shape, bias = (n, self.features, h, w), None if self.bias is None else self.bias[:, None, None]
        else:
            shape, bias = (*hidden_states.shape[:-1], self.features), self.bias
        if bias is None:
            return hidden_states.new_zeros(shape)
        return bias.to(hidden_states.dtype).expand(shape).clone()  # not a view of a parameter: those upset hooks


class NoFeatures(nn.Module):
    """A layer, or an attention without an output layer, that has no features left."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(N, T, C) -> (N, T, 0)."""
        return hidden_states[..., :0]
