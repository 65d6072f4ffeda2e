"""Inner channels of `ResnetBlock2D`, by the groups of its second GroupNorm, and its whole body."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffaccel.pruning.groups import Group, Site
from diffaccel.pruning.parts.constant import Constant
from diffaccel.pruning.parts.layers import plain


def channels(name: str, resnet: Any) -> list[Group]:
    """Two groups: one unit a group of `norm2`, and the body as one unit.

    Single channels cannot go: the mean and variance of their norm group would change. The mask is at the input of
    `conv2`, not before `norm2`, where a channel at zero still sends SiLU(beta) on (pruning.md 1.5).

    Raises:
        NotPrunableError: if a layer is not a plain one.
    """
    for key in ("conv1", "norm2", "conv2", *(["time_emb_proj"] if resnet.time_emb_proj is not None else [])):
        plain(getattr(resnet, key), f"{name}.{key}")
    count, width = resnet.norm2.num_groups, resnet.norm2.num_channels // resnet.norm2.num_groups
    groups = Group(f"{name}.channels", "channels", count, (name,), tuple(_sites(name, resnet, width)))
    body = Group(f"{name}.body", "resnet", 1, (name,), tuple(_sites(name, resnet, resnet.norm2.num_channels)))
    return [groups, body]


def _sites(name: str, resnet: Any, size: int) -> list[Site]:
    sites = [Site(f"{name}.conv1", "out", size)]
    if resnet.time_emb_proj is not None:
        total = resnet.norm2.num_channels
        starts = (0, total) if resnet.time_emb_proj.out_features == 2 * total else (0,)  # scale and shift
        sites.append(Site(f"{name}.time_emb_proj", "out", size, starts))
    return [*sites, Site(f"{name}.norm2", "out", size), Site(f"{name}.conv2", "in", size)]


class ConstantResnet(nn.Module):
    """A ResNet without its body: the shortcut, and the bias of `conv2`."""

    def __init__(self, resnet: Any):
        super().__init__()
        self.upsample, self.downsample = resnet.upsample, resnet.downsample
        self.conv_shortcut = resnet.conv_shortcut
        self.conv2 = Constant(resnet.conv2)
        self.output_scale_factor = resnet.output_scale_factor
        self.in_channels, self.out_channels = resnet.in_channels, resnet.out_channels

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W), twice or half as large if the ResNet resamples."""
        resample = self.upsample or self.downsample
        shortcut = input_tensor if resample is None else resample(input_tensor)
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        return (shortcut + self.conv2(shortcut)) / self.output_scale_factor
