"""Group norms on regions: with the statistics of the reference, or with their exact update by the region."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffaccel.kernels.boxes import Boxes
from diffaccel.kernels.cache import BoxLayout
from diffaccel.kernels.crop import cut, split, strip_of
from diffaccel.kernels.hooks import SiteHook, map_size


class NormHook(SiteHook):
    """`GroupNorm` with the statistics of the reference, or with their exact update by the region."""

    @property
    def statistics(self) -> str:
        """Of this norm: "cached", "incremental" or "corrected"."""
        chosen = self.engine.config.statistics
        if chosen != "last":
            return chosen
        return "incremental" if self.name == "conv_norm_out" else "cached"

    def new_forward(self, module: nn.GroupNorm, x: Tensor) -> Tensor:
        """As `SiteHook` says; x is (B, C, h, w) or (B, C, tokens)."""
        engine = self.engine
        if engine.mode == "off":
            return self.original(x)
        if engine.mode == "record":
            self._record(module, x)
            return self.original(x)
        boxes = engine.boxes(self.size)
        if boxes is None:
            self._offer_whole(module, x)
            return self.original(x)
        mean, variance = (engine.slot[f"{self.name}.{which}"].to(x.device) for which in ("mean", "var"))
        if self.statistics != "cached" and engine.maps:
            mean, variance = self._updated(module, x, boxes, mean, variance)
        channels = module.num_channels // module.num_groups
        scale = (variance + module.eps).rsqrt().repeat_interleave(channels, 1)
        mean = mean.repeat_interleave(channels, 1)
        if module.affine:
            scale = scale * module.weight
        shift = -mean * scale + (module.bias if module.affine else 0)
        shape = scale.shape + (1,) * (x.ndim - 2)
        return torch.addcmul(shift.view(shape), x.float(), scale.view(shape)).to(x.dtype)

    def _record(self, module: nn.GroupNorm, x: Tensor) -> None:
        self.size = map_size(x) if x.ndim == 4 else self.engine.grid(x.shape[-1])
        slot, (mean, variance) = self.engine.slot, _statistics(module, x)
        slot[f"{self.name}.mean"], slot[f"{self.name}.var"] = mean, variance
        if self.statistics != "cached" and self.engine.maps:
            slot.put(self.name, x.unflatten(2, self.size) if x.ndim == 3 else x)

    def _offer_whole(self, module: nn.GroupNorm, x: Tensor) -> None:
        """At a level that runs dense."""
        slot, (mean, variance) = self.engine.slot, _statistics(module, x)
        slot.offer(f"{self.name}.mean", mean, exact=True)
        slot.offer(f"{self.name}.var", variance, exact=True)
        self.offer_whole(self.name, x.unflatten(2, self.size) if x.ndim == 3 else x)

    def _updated(
        self, module: nn.GroupNorm, x: Tensor, boxes: Boxes, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of the map after the region changed; moments about the old mean keep the digits."""
        strip = x.unflatten(2, (boxes.height, -1)) if x.ndim == 3 else x
        slot, channels = self.engine.slot, module.num_channels // module.num_groups
        old = strip_of(cut(slot[self.name], boxes, like=x), boxes)
        once = _once(boxes, mean)
        (new1, new2), (old1, old2) = (_moments(values, boxes, mean, once) for values in (strip, old))
        slot.offer(self.name, strip, BoxLayout(boxes))
        if self.statistics == "incremental":
            total = boxes.map[0] * boxes.map[1] * channels
            moved = (new1 - old1) / total
            mean, variance = mean + moved, (variance + (new2 - old2) / total - moved**2).clamp_min(0)
        else:  # what surrounds the region is taken to change as it does
            area = once.sum(1) * (boxes.height * boxes.width * channels)
            spread = (new2 / area - (new1 / area) ** 2) / (old2 / area - (old1 / area) ** 2).clamp_min(module.eps)
            mean, variance = mean + (new1 - old1) / area, variance * spread.clamp(0.25, 4)
        slot.offer(f"{self.name}.mean", mean, exact=True)
        slot.offer(f"{self.name}.var", variance, exact=True)
        return mean, variance


def _statistics(module: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each row and group, in float32 whatever the cache's type is."""
    values = x.detach().float().reshape(len(x), module.num_groups, -1)
    mean = values.mean(2)
    return mean, (values - mean[..., None]).square().mean(2)  # on the CPU eight times as fast as var_mean


def _once(boxes: Boxes, mean: Tensor) -> Tensor:
    """1 for each box of each row of the batch, (B, k, 1), and 0 for those that repeat another."""
    first = [[float(corner not in row[:i]) for i, corner in enumerate(row)] for row in boxes.corners]
    return torch.tensor(first, device=mean.device).repeat(len(mean) // len(first), 1)[:, :, None]


def _moments(strip: Tensor, boxes: Boxes, mean: Tensor, once: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the strip's differences from `mean`, and of their squares, by row and group."""
    pieces = split(strip, boxes).unflatten(0, (-1, boxes.count)).float()
    grouped = pieces.flatten(3).unflatten(2, (mean.shape[1], -1)).flatten(3) - mean[:, None, :, None]
    return (grouped.sum(3) * once).sum(1), (grouped.square().sum(3) * once).sum(1)
