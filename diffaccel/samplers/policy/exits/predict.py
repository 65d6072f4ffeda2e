"""Predictions for a training batch, each row at the depth that its noise level has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffaccel.samplers.policy.exits.depth import shallow, told_scale
from diffaccel.samplers.policy.exits.schedule import DepthSchedule
from diffaccel.samplers.policy.rows import split


def predict(
    network: nn.Module, schedule: DepthSchedule, sample: Tensor, timestep: Tensor, **conditioning: Any
) -> Tensor:
    """Output of `network` for every row, left at the depth of the row's timestep, with gradients.

    The ASE loss (arXiv:2408.05927) is any diffusion loss of this prediction: only the exit that a row will leave at is
    supervised. Its code runs all blocks and picks one output a row; here the rows of one depth run together, through
    these blocks only, with the same gradients at a part of the cost.

    Args:
        network: DiT, PixArt, SD3, Flux, or a U-Net.
        schedule: depths over the training time.
        sample: (N, ...) noised latents.
        timestep: (N,) as the network takes it: in the units of the schedule, for Flux a thousandth of it.
        conditioning: further arguments; tensors of N rows are cut with them.
    """
    views: dict[str, Any] = {}
    scale = told_scale(network)
    names = [str(schedule.depth(time / scale)) for time in timestep.tolist()]
    for name in dict.fromkeys(names):
        views[name] = shallow(network, int(name))

    def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return views[name](*args, **kwargs, return_dict=False)

    return split(names, call, (sample,), {"timestep": timestep, **conditioning})[0]
