"""Neurons of Diffusers' `FeedForward`: GELU and its approximations, GEGLU, SwiGLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffaccel.pruning.groups import Group, Site
from diffaccel.pruning.parts.constant import Constant
from diffaccel.pruning.parts.layers import plain

STEPS = (64, 32, 16, 8, 4, 2)  # widths stay multiples of one of these, of which a layer has at least 16


def neurons(name: str, ff: Any) -> Group:
    """One unit a neuron: a row of the first layer (two with GEGLU: value and gate), a column of the second.

    Raises:
        NotPrunableError: if a layer is not a plain Linear.
    """
    first: Any = plain(ff.net[0].proj, f"{name}.net.0.proj")
    second: Any = plain(ff.net[2], f"{name}.net.2")
    count = second.in_features
    starts = (0, count) if first.out_features == 2 * count else (0,)
    sites = (Site(f"{name}.net.0.proj", "out", 1, starts), Site(f"{name}.net.2", "in"))
    return Group(f"{name}.neurons", "neurons", count, (name,), sites, step_of(count))


def step_of(count: int) -> int:
    """Neurons that are removed at a time."""
    return next((step for step in STEPS if count % step == 0 and count >= 16 * step), 1)


class ConstantFeedForward(nn.Module):
    """A feed-forward layer without neurons: the bias of its second layer."""

    def __init__(self, ff: Any):
        super().__init__()
        self.net = nn.ModuleDict({"2": Constant(ff.net[2])})  # under the name that the bias has in the whole layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        return self.net["2"](hidden_states)
