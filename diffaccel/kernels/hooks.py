"""Hooks on single modules, with which Diffusers' own forward runs on regions: the crop executor.

Each knows three modes of its engine: "off", "record" (the module runs as it is, and what edits will read is kept) and
"sparse" (the module's input is a strip, see `crop`, at levels where the region has boxes, and a map at others).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch.nn.functional as F
from diffusers.hooks import ModelHook
from torch import Tensor, nn

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
    strip_of,
)
from diffaccel.kernels.packed import PackedWeights

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

    def turn(self) -> str:
        """The module's name; numbered where one call of the network calls it again (ResNets that resample)."""
        turns = self.engine.turns
        turns[self.name] = turns.get(self.name, 0) + 1
        return self.name if turns[self.name] == 1 else f"{self.name}.{turns[self.name]}"

    def halo(self, name: str, strip: Tensor, boxes: Boxes, windows: Boxes) -> Tensor:
        """Windows on this module's input map: the strip, and around it the reference, or the strip's own edge."""
        engine = self.engine
        if not engine.maps:
            return extended(strip, boxes, windows)
        engine.slot.offer(name, strip, BoxLayout(boxes))
        return overlay(cut(engine.slot[name], windows, like=strip), strip, boxes, windows)

    def offer_whole(self, name: str, full: Tensor) -> None:
        """The map at a level that runs dense, for when the edit is accepted."""
        if name in self.engine.slot:
            self.engine.slot.offer(name, full)


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
        self._packed = PackedWeights()

    def new_forward(self, module: Any, x: Tensor) -> Tensor:
        """As `SiteHook` says."""
        if self.engine.mode == "off":
            return self.original(x)
        name = self.turn()
        if self.engine.mode == "record":
            return self._record(name, module, x)

        def forward(x: Tensor) -> Tensor:
            return self._packed.convolve(module, x) if self._packed.serve(module, x) else self.original(x)

        if self.kind == "entry":
            self._check(x)
        before, after = self.engine.boxes(self.size), self.engine.boxes(self.out)
        if self.kind == "upsampled":
            return forward(x) if after is None else strip_of(unpadded(module, forward, x), after)
        x = x[..., : x.shape[-2] - self.trailing, : x.shape[-1] - self.trailing] if self.trailing else x
        if after is None:  # the level below runs dense
            return forward(self._dense(name, x, before))
        assert before is not None
        windows = conv_windows(after, self.size, *geometry(module))
        pieces = cut(x, windows) if self.kind == "entry" else self.halo(name, x, before, windows)
        strip = strip_of(unpadded(module, forward, pieces), after)
        return self._leave(strip, after) if self.kind == "exit" else strip

    def _record(self, name: str, module: Any, x: Tensor) -> Tensor:
        engine = self.engine
        known = x[..., : x.shape[-2] - self.trailing, : x.shape[-1] - self.trailing] if self.trailing else x
        out = self.original(x)
        self.size, self.out = map_size(known), map_size(out)
        _, stride, _ = geometry(module)
        if self.out != (-(-self.size[0] // stride[0]), -(-self.size[1] // stride[1])):
            raise ValueError(
                f"{self.name} makes {self.out} of {self.size}, where sparse edits round up; choose a height and a "
                "width that the network halves without a rest"
            )
        engine.see(self.size)
        engine.see(self.out)
        if self.kind == "entry":
            engine.input_size, engine.slot.shape = self.size, tuple(x.shape)
        if engine.maps and self.kind in ("inner", "exit"):
            engine.slot.put(name, known)
        if self.kind == "exit":
            engine.slot.put(f"{name}.out", out, exact=True)
        return out

    def _dense(self, name: str, x: Tensor, before: Boxes | None) -> Tensor:
        """What the module reads where it runs dense: the whole map, out of a strip or of itself."""
        full = x if before is None else place(self.engine.slot[name], x, before)
        if before is None:
            self.offer_whole(name, full)
        else:
            self.engine.slot.offer(name, x, BoxLayout(before))
        return F.pad(full, (0, self.trailing) * 2) if self.trailing else full

    def _leave(self, strip: Tensor, boxes: Boxes) -> Tensor:
        name = f"{self.name}.out"
        self.engine.slot.offer(name, strip, BoxLayout(boxes), exact=True)
        return place(self.engine.slot[name], strip, boxes)

    def _check(self, x: Tensor) -> None:
        """Raise unless the call is as the recorded one."""
        recorded, masks = self.engine.slot.shape, len(self.engine.region.masks)
        if recorded != tuple(x.shape) or map_size(x) != self.size:
            last = "" if recorded != tuple(x.shape) else f", before another of {self.size}"
            raise ValueError(
                f"the recorded call had an input of {recorded}{last}, and the edit has {tuple(x.shape)}; record a call "
                "with the same batch, height and width first"
            )
        if len(x) % masks:
            raise ValueError(f"{masks} masks for a batch of {len(x)}; give one mask, or one for each picture")


class UpsampleHook(SiteHook):
    """`Upsample2D`: doubles only what its convolution reads for the boxes of the finer level."""

    def __init__(self, engine: Any, name: str):
        super().__init__(engine, name)
        self.high: tuple[int, int] = (0, 0)

    def new_forward(self, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `SiteHook` says."""
        engine = self.engine
        if engine.mode == "off":
            return self.original(x, *args, **kwargs)
        name = self.turn()
        if engine.mode == "record":
            return self._record(name, x, *args, **kwargs)
        low, high = engine.boxes(self.size), engine.boxes(self.high)
        if low is None:
            self.offer_whole(name, x)
        if high is None:
            return self.original(x, *args, **kwargs)
        conv = (module.conv if module.name == "conv" else module.Conv2d_0) if module.use_conv else None
        windows = high if conv is None else conv_windows(high, self.high, *geometry(conv))
        half = half_windows(windows, self.size)
        pieces = doubled(cut(x, half) if low is None else self.halo(name, x, low, half), half, windows)
        return strip_of(pieces, high) if conv is None else conv(pieces)

    def _record(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        engine = self.engine
        if engine.maps:
            engine.slot.put(name, x)
        out = self.original(x, *args, **kwargs)
        self.size, self.high = map_size(x), map_size(out)
        engine.see(self.size)
        engine.see(self.high)
        return out


class BesideHook(SiteHook):
    """What makes a map beside the path, such as ControlNet's of its condition: computed whole, then cut."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As `SiteHook` says."""
        out = self.original(*args, **kwargs)
        boxes = self.engine.boxes(map_size(out)) if self.engine.mode == "sparse" else None
        return out if boxes is None else crop(out, boxes)


def geometry(module: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel (dilated), stride and padding of a convolution or pooling, also within LoRA."""
    module = getattr(module, "base_layer", module)
    kernel, stride, padding = (_pair(getattr(module, name)) for name in ("kernel_size", "stride", "padding"))
    dilation = _pair(getattr(module, "dilation", 1))
    return (dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1), stride, padding


def map_size(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a map."""
    return x.shape[-2], x.shape[-1]


def unpadded(module: nn.Module, forward: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """The module on windows that hold their own halo; of LoRA, all its convolutions."""
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.AvgPool2d):
                stack.enter_context(_padding(part, 0))
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
