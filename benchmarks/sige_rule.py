"""SIGE's rule (Li et al., arXiv:2211.02048) as hooks on any U-Net of Diffusers, with dense arithmetic: for its error.

Written anew from the published rule and its settings (lmxyy/sige 0.3.0). What SIGE skips is computed here and thrown
away, so that its error on a network is known without its engine; nothing is said about its speed.

- Masks: the edit, dilated by 5 pixels of the picture, is averaged over 2 x 2 again and again; at each resolution what
  is above 0.3 is active, dilated by 1 pixel. Dilations are plus-shaped.
- Convolutions: tiles of 4 x 4 results (2 x 2 for stride 2). A tile whose input window, halo included, touches the mask
  of the input's resolution is new, from a map that is new in active tiles and recorded elsewhere; others are recorded.
- Group norm: the affine map of the recorded run, on all levels.
- Transformers: queries, cross-attention and feed-forward of active tiles; keys and values of all tokens of the map.
- Dense: first and last convolution and last group norm. DDPM: all below 64 rows but the upsamplers. SD: the middle
  block, whose residual blocks have their own statistics.

The bug of SIGE's DDPM attention (one channel's statistics for all) is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DILATION, THRESHOLD, TILE = 5, 0.3, 4


class SigeRule:
    """One recorded call of a network, and calls with another input where a mask says so.

        rule = SigeRule(unet, "ddpm")
        with rule.record():
            reference = unet(x, t).sample
        with rule.edit(mask):
            edited = unet(x2, t).sample
        rule.remove()

    Args:
        network: `UNet2DModel` or `UNet2DConditionModel`, square maps.
        setting: which of SIGE's networks it stands for; they differ in what is dense.
        sparse_from: "ddpm": rows from which blocks are sparse.
    """

    def __init__(self, network: nn.Module, setting: Literal["ddpm", "sd"], *, sparse_from: int = 64):
        self._setting, self._sparse_from = setting, sparse_from
        self._mode, self._kept, self._masks = "off", {}, {}
        self._hooks = []
        for name, module in network.named_modules():
            hook = self._hook_for(name, module)
            if hook is not None:
                self._hooks.append(module.register_forward_hook(hook))

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep what the call in the block computes."""
        self._mode, self._kept = "record", {}
        try:
            yield
        finally:
            self._mode = "off"

    @contextmanager
    def edit(self, mask: Tensor) -> Iterator[None]:
        """Let the call in the block follow the rule; `mask` is bool, rows x columns of the picture."""
        self._mode, self._masks = "edit", pyramid(dilated(mask, DILATION))
        try:
            yield
        finally:
            self._mode = "off"

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _hook_for(self, name: str, module: Any) -> Callable[..., Any] | None:
        last = name.rpartition(".")[2]
        middle = name.startswith("mid_block")
        if name in ("conv_in", "conv_out", "conv_norm_out"):
            return None
        if isinstance(module, nn.GroupNorm):
            own = self._setting == "sd" and middle and ".resnets." in name
            return None if own else self._norm(name)
        if middle:
            return None
        if isinstance(module, nn.Conv2d):
            return self._convolution(name, always=self._setting == "sd" or ".upsamplers." in name)
        if ".transformer_blocks." in name and last in ("attn1", "attn2", "ff"):
            return self._tokens(name)
        return None

    def _norm(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.GroupNorm, args: tuple[Tensor], out: Tensor) -> Tensor:
            x = args[0]
            if self._mode == "record":
                self._kept[name] = torch.var_mean(x.reshape(len(x), module.num_groups, -1), dim=2, correction=0)
            if self._mode != "edit":
                return out
            variance, mean = self._kept[name]
            grouped = x.reshape(len(x), module.num_groups, -1)
            normed = (grouped - mean[..., None]) * (variance[..., None] + module.eps).rsqrt()
            shape = (1, -1) + (1,) * (x.ndim - 2)
            return normed.view(x.shape) * module.weight.view(shape) + module.bias.view(shape)

        return hook

    def _convolution(self, name: str, always: bool) -> Callable[..., Any]:
        def hook(module: nn.Conv2d, args: tuple[Tensor], out: Tensor) -> Tensor:
            stride, rows = module.stride[0], out.shape[-1] * module.stride[0]
            if not always and rows < self._sparse_from:
                return out
            if self._mode == "record":
                self._kept[name] = out
            if self._mode != "edit":
                return out
            tiles = active(self._masks[rows], module.kernel_size[0], stride, int(module.padding[0]))
            return torch.where(tiles[: out.shape[-2], : out.shape[-1]], out, self._kept[name])

        return hook

    def _tokens(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            if self._mode == "record":
                self._kept[name] = out
            if self._mode != "edit":
                return out
            rows = round(out.shape[1] ** 0.5)
            return torch.where(active(self._masks[rows], 1, 1, 0)[:rows, :rows].reshape(-1, 1), out, self._kept[name])

        return hook


def dilated(mask: Tensor, pixels: int) -> Tensor:
    """The mask and so many pixels up, down, left and right of it, but not across."""
    values, size = mask[None, None].float(), 2 * pixels + 1
    rows = F.max_pool2d(values, (size, 1), 1, (pixels, 0))
    columns = F.max_pool2d(values, (1, size), 1, (0, pixels))
    return (rows + columns)[0, 0] > 0


def pyramid(mask: Tensor) -> dict[int, Tensor]:
    """Masks by rows, from the picture's down to one of 4 rows."""
    share, masks = mask[None, None].float(), {}
    while share.shape[-2] >= TILE:
        masks[share.shape[-2]] = dilated(share[0, 0] > min(THRESHOLD, float(share.max()) - 1e-3), 1)
        share = F.avg_pool2d(share, 2)  # bilinear interpolation to half the size
    return masks


def active(mask: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Results of a convolution in active tiles, perhaps a few rows and columns more; `mask` is that of its input."""
    tile = TILE // stride
    window = (tile - 1) * stride + kernel
    padded = F.pad(mask[None, None].float(), (padding, window, padding, window))
    tiles = F.max_pool2d(padded, window, TILE)[0, 0] > 0
    return tiles.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
