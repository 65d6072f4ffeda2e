"""Hooks on single modules, with which Diffusers' own forward runs on regions: the crop executor.

Each knows three modes of its engine: "off", "record" (the module runs as it is, and what edits will read is kept) and
"sparse" (the module's input is a strip, see `crop`, at levels where the region has boxes, and a map at others).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffaccel.kernels.boxes import Boxes
from diffaccel.kernels.cache import BoxLayout
from diffaccel.kernels.crop import (
    conv_windows,
    crop,
    cut,
    doubled,
    extended,
    half_windows,
    overlay,
    place,
    split,
    strip_of,
)

Kind = Literal["inner", "entry", "exit", "upsampled"]


class SiteHook(ModelHook):
    """What the hooks share: the engine, the module's name, and the size of its map."""

    def __init__(self, engine: Any, name: str):
        super().__init__()
        self.engine, self.name = engine, name
        self.size: tuple[int, int] = (0, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteHook:
        raise ValueError(
            "a network with sparse edits cannot be copied: the copy would call this one; remove them first"
        )

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module as it is."""
        return self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[reportOptionalCall]

    def halo(self, strip: Tensor, boxes: Boxes, windows: Boxes) -> Tensor:
        """Windows on this module's input map: the strip, and around it the reference, or the strip's own edge."""
        engine = self.engine
        if not engine.maps:
            return extended(strip, boxes, windows)
        engine.slot.offer(self.name, strip, BoxLayout(boxes))
        return overlay(cut(engine.slot[self.name], windows, like=strip), strip, boxes, windows)


class WindowHook(SiteHook):
    """Convolutions and poolings that look beyond a pixel.

    Args:
        engine: of the network.
        name: of the module.
        kind: "entry": the input is a map, the network's own. "exit": the result is a map, the reference's with the
            region replaced. "upsampled": the input comes as windows, from `UpsampleHook`.
        trailing: rows and columns of zeros that the module before appended (`Downsample2D` with padding 0).
    """

    def __init__(self, engine: Any, name: str, kind: Kind, trailing: int = 0):
        super().__init__(engine, name)
        self.kind, self.trailing = kind, trailing
        self.out: tuple[int, int] = (0, 0)

    def new_forward(self, module: Any, x: Tensor) -> Tensor:
        """As `SiteHook` says."""
        if self.engine.mode == "off":
            return self.original(x)
        if self.engine.mode == "record":
            return self._record(x)
        before, after = self.engine.boxes(self.size), self.engine.boxes(self.out)
        if self.kind == "upsampled":
            return self.original(x) if after is None else strip_of(unpadded(module, self.original, x), after)
        if before is None:
            return self.original(x)
        x = x[..., : x.shape[-2] - self.trailing, : x.shape[-1] - self.trailing]
        if after is None:  # the level below runs dense
            full = place(self.engine.slot[self.name], x, before)
            self.engine.slot.offer(self.name, x, BoxLayout(before))
            return self.original(F.pad(full, (0, self.trailing) * 2))
        windows = conv_windows(after, self.size, *geometry(module))
        pieces = cut(x, windows) if self.kind == "entry" else self.halo(x, before, windows)
        strip = strip_of(unpadded(module, self.original, pieces), after)
        return self._leave(strip, after) if self.kind == "exit" else strip

    def _record(self, x: Tensor) -> Tensor:
        engine = self.engine
        known = x[..., : x.shape[-2] - self.trailing, : x.shape[-1] - self.trailing] if self.trailing else x
        out = self.original(x)
        self.size, self.out = map_size(known), map_size(out)
        engine.see(self.size)
        engine.see(self.out)
        if self.kind == "entry":
            engine.input_size = self.size
        if engine.maps and self.kind in ("inner", "exit"):
            engine.slot.put(self.name, known)
        if self.kind == "exit":
            engine.slot.put(f"{self.name}.out", out)
        return out

    def _leave(self, strip: Tensor, boxes: Boxes) -> Tensor:
        self.engine.slot.offer(f"{self.name}.out", strip, BoxLayout(boxes))
        return place(self.engine.slot[f"{self.name}.out"], strip, boxes)


class UpsampleHook(SiteHook):
    """`Upsample2D`: doubles only what its convolution reads for the boxes of the finer level."""

    def __init__(self, engine: Any, name: str):
        super().__init__(engine, name)
        self.high: tuple[int, int] = (0, 0)

    def new_forward(self, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `SiteHook` says."""
        engine = self.engine
        if engine.mode == "record":
            self.size = map_size(x)
            if engine.maps:
                engine.slot.put(self.name, x)
            out = self.original(x, *args, **kwargs)
            self.high = map_size(out)
            engine.see(self.size)
            engine.see(self.high)
            return out
        low, high = (None, None) if engine.mode == "off" else (engine.boxes(self.size), engine.boxes(self.high))
        if high is None:
            return self.original(x, *args, **kwargs)
        conv = (module.conv if module.name == "conv" else module.Conv2d_0) if module.use_conv else None
        inner: Any = getattr(conv, "base_layer", conv)  # of LoRA
        windows = high if conv is None else conv_windows(high, self.high, *geometry(inner))
        half = half_windows(windows, self.size)
        pieces = doubled(cut(x, half) if low is None else self.halo(x, low, half), half, windows)
        return strip_of(pieces, high) if conv is None else conv(pieces)


class NormHook(SiteHook):
    """`GroupNorm` with the statistics of the reference, or with their exact update by the region."""

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
            return self.original(x)
        mean, variance = (engine.slot[f"{self.name}.{which}"].to(x.device) for which in ("mean", "var"))
        if engine.config.norm == "incremental" and engine.maps:
            mean, variance = self._updated(module, x, boxes, mean, variance)
        channels = module.num_channels // module.num_groups
        scale = (variance + module.eps).rsqrt().repeat_interleave(channels, 1)
        mean = mean.repeat_interleave(channels, 1)
        if module.affine:
            scale = scale * module.weight
        shift = -mean * scale + (module.bias if module.affine else 0)
        shape = scale.shape + (1,) * (x.ndim - 2)
        return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))

    def _record(self, module: nn.GroupNorm, x: Tensor) -> None:
        self.size = map_size(x) if x.ndim == 4 else self.engine.grid(x.shape[-1])
        variance, mean = torch.var_mean(x.float().reshape(len(x), module.num_groups, -1), dim=2, correction=0)
        slot = self.engine.slot
        slot[f"{self.name}.mean"], slot[f"{self.name}.var"] = mean.detach(), variance.detach()
        if self.engine.config.norm == "incremental" and self.engine.maps:
            slot.put(self.name, x.unflatten(2, self.size) if x.ndim == 3 else x)

    def _updated(
        self, module: nn.GroupNorm, x: Tensor, boxes: Boxes, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of the map after the region changed; moments about the old mean keep the digits."""
        strip = x.unflatten(2, (boxes.height, -1)) if x.ndim == 3 else x
        slot, total = self.engine.slot, boxes.map[0] * boxes.map[1] * (module.num_channels // module.num_groups)
        old = crop(slot[self.name].to(x), boxes)
        (new1, new2), (old1, old2) = (_moments(values, boxes, mean, module.num_groups) for values in (strip, old))
        moved = (new1 - old1) / total
        slot.offer(self.name, strip, BoxLayout(boxes))
        mean, variance = mean + moved, (variance + (new2 - old2) / total - moved**2).clamp_min(0)
        slot.offer_whole(f"{self.name}.mean", mean)
        slot.offer_whole(f"{self.name}.var", variance)
        return mean, variance


class AttentionHook(SiteHook):
    """Self-attention: queries of the region, keys and values of the reference with the region's in their place."""

    def new_forward(self, module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `SiteHook` says; attention to the prompt stays as it is."""
        engine = self.engine
        crossed = args[0] if args else kwargs.get("encoder_hidden_states")
        if engine.mode == "off" or (crossed is not None and not engine.joint):
            return self.original(hidden_states, *args, **kwargs)
        change = self._record if engine.mode == "record" else self._sparse
        with KeysValues(change) as seen:
            out = self.original(hidden_states, *args, **kwargs)
        if seen.calls != 1:
            raise RuntimeError(
                f"{self.name} called scaled_dot_product_attention {seen.calls} times, and sparse edits need one call; "
                "set Diffusers' default attention processor (network.set_default_attn_processor()), unfused"
            )
        return out

    def _record(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.engine.slot.put(f"{self.name}.k", key)
        self.engine.slot.put(f"{self.name}.v", value)
        return key, value

    def _sparse(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        engine, names = self.engine, (f"{self.name}.k", f"{self.name}.v")
        layout = engine.layout(engine.slot[names[0]].shape[2])
        if layout is None:  # this level runs dense
            return key, value
        both = []
        for name, part in zip(names, (key, value), strict=True):
            engine.slot.offer(name, part, layout)
            both.append(layout.write(engine.slot[name].to(part, copy=True), part))
        return both[0], both[1]


class KeysValues(TorchFunctionMode):
    """Changes keys and values on their way into `scaled_dot_product_attention`, whatever computed them.

    That is after rotary embeddings and normalisation, so that what is kept is used as it is.
    """

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
        super().__init__()
        self._change, self.calls = change, 0

    def __torch_function__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Pass everything on but that one function."""
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        query, key, value = [*args[:3], *(kwargs.pop(name) for name in ("query", "key", "value")[len(args) :])]
        return func(query, *self._change(key, value), *args[3:], **kwargs)


def geometry(module: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel (dilated), stride and padding of a convolution or pooling."""
    kernel, stride, padding = (_pair(getattr(module, name)) for name in ("kernel_size", "stride", "padding"))
    dilation = _pair(getattr(module, "dilation", 1))
    return (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1), stride, padding


def map_size(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a map."""
    return x.shape[-2], x.shape[-1]


def unpadded(module: Any, forward: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """The module on windows that hold their own halo."""
    with _padding(module, 0):
        return forward(windows)


@contextmanager
def _padding(module: Any, value: int) -> Iterator[None]:
    kept = module.padding
    module.padding = value if isinstance(kept, int) else (value, value)
    try:
        yield
    finally:
        module.padding = kept


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _moments(strip: Tensor, boxes: Boxes, mean: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sums of the strip's differences from `mean`, and of their squares, by row and group; each box once."""
    pieces = split(strip, boxes).unflatten(0, (-1, boxes.count)).float()
    grouped = pieces.flatten(3).unflatten(2, (groups, -1)).flatten(3) - mean[:, None, :, None]  # (B, k, groups, values)
    once = torch.tensor(
        [[corner not in row[:i] for i, corner in enumerate(row)] for row in boxes.corners],
        dtype=grouped.dtype,
        device=grouped.device,
    )
    weight = once.repeat(len(grouped) // len(once), 1)[:, :, None]
    return (grouped.sum(3) * weight).sum(1), (grouped.square().sum(3) * weight).sum(1)
