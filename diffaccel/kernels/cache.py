"""Features of the reference that edits read: kept by network call and by module, within a limit."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.crop import write

Key = Hashable  # of a network call, such as (step, number of the call in the step)


class Slot(dict[str, Tensor]):
    """Features of one network call by name; what an edit computed instead waits in `pending` until it is accepted."""

    def __init__(self, cache: FeatureCache):
        super().__init__()
        self._cache = cache
        self.pending: dict[str, tuple[Tensor, Any]] = {}
        self.shape: tuple[int, ...] = ()  # of the network's input
        self._last: tuple[Tensor, Tensor] | None = None

    def put(self, name: str, value: Tensor, exact: bool = False) -> None:
        """Keep a tensor, moved and, unless `exact`, cast as the cache asks; the same one twice is kept once."""
        if exact:
            self[name] = self._cache.kept(value, exact)
            return
        if self._last is None or self._last[0] is not value:
            self._last = value, self._cache.kept(value)
        self[name] = self._last[1]

    def offer(self, name: str, value: Tensor, layout: Any = None, exact: bool = False) -> None:
        """Keep a feature until it is accepted.

        Args:
            name: of the feature.
            value: its new region, which `layout.write(full, region)` puts in its place; without a layout, all of it.
            layout: of the region.
            exact: not cast.
        """
        self.pending[name] = self._cache.kept(value, exact), layout

    def accept(self) -> None:
        """Make the edit's features those of the reference."""
        for name, (value, layout) in self.pending.items():
            if layout is None:
                self[name] = value
            else:
                layout.write(self[name], value)
        self.pending.clear()

    def finish(self) -> None:
        """Forget what only the call itself needs."""
        self._last = None


class FeatureCache:
    """Slots by network call.

    Args:
        dtype: of the kept floating-point features; None as computed.
        device: where they wait; None where they were computed.
        limit: bytes.
    """

    def __init__(self, dtype: torch.dtype | None = None, device: str | None = None, limit: int | None = None):
        self._dtype, self._device, self.limit = dtype, device, limit
        self._slots: dict[Key, Slot] = {}
        self._offered: dict[Key, Slot] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def __getitem__(self, key: Key) -> Slot:
        return self._slots[key]

    def new(self, key: Key) -> Slot:
        """An empty slot in place of an older one."""
        self._slots[key] = Slot(self)
        return self._slots[key]

    def offer(self, key: Key) -> Slot:
        """An empty slot that takes the place of the one there is when it is accepted."""
        self._offered[key] = Slot(self)
        return self._offered[key]

    def clear(self) -> None:
        """Drop all slots."""
        self._slots.clear()
        self._offered.clear()

    @torch.inference_mode()  # in place also where the features were made in this mode
    def accept(self) -> None:
        """Make what the last edit computed the reference, in place."""
        for slot in self._slots.values():
            slot.accept()
        self._slots.update(self._offered)
        self._offered.clear()

    def reject(self, *keys: Key) -> None:
        """Forget what the last edit computed; of these network calls, or of all."""
        for key in keys or (*self._slots, *self._offered):
            self._offered.pop(key, None)
            if key in self._slots:
                self._slots[key].pending.clear()

    def bytes(self) -> int:
        """Taken by all slots; tensors that are kept under two names count once, pending ones too."""
        slots = [*self._slots.values(), *self._offered.values()]
        tensors = [tensor for slot in slots for tensor in slot.values()]
        tensors += [value for slot in slots for value, _ in slot.pending.values()]
        return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

    def check(self, calls: int) -> None:
        """Raise unless `calls` slots like those that there are fit.

        Raises:
            MemoryError: with the bytes they would take, and what takes less.
        """
        needed = calls * self.bytes() // max(1, len(self._slots))
        if self.limit is not None and needed > self.limit:
            raise MemoryError(
                f"the features of {calls} network calls take {needed / 2**20:,.0f} MiB, and memory_limit is "
                f"{self.limit / 2**20:,.0f} MiB; write cache_dtype=torch.float16, fewer steps, or reference='self', "
                "which keeps those of one call"
            )

    def kept(self, value: Tensor, exact: bool = False) -> Tensor:
        """The tensor as it waits; an exact one is a copy, since callers have it too."""
        dtype = self._dtype if value.is_floating_point() and not exact else None
        part = not torch.compiler.is_compiling() and value.untyped_storage().nbytes() > value.nbytes
        return value.detach().to(device=self._device, dtype=dtype, copy=exact or part)  # a part would keep the whole


class BoxLayout:
    """Where a strip belongs on a map; see `crop`."""

    def __init__(self, boxes: Any):
        self.boxes = boxes

    def write(self, full: Tensor, strip: Tensor) -> Tensor:
        """Put the strip into the map, in place."""
        return write(full, strip, self.boxes)


class GridLayout:
    """Where the keys and values of a strip's tokens belong among those of all: (B, heads, tokens, width)."""

    def __init__(self, boxes: Any):
        self.boxes = boxes

    def write(self, full: Tensor, part: Tensor) -> Tensor:
        """Put the region's rows among all rows, in place."""
        (height, width), boxes = self.boxes.map, self.boxes
        grid = full.unflatten(2, (height, width))
        strip = part.unflatten(2, (boxes.height, boxes.count * boxes.width))
        for rows, number, y, x in boxes.places():
            piece = strip[rows, :, :, number * boxes.width : (number + 1) * boxes.width]
            grid[rows, :, y : y + boxes.height, x : x + boxes.width] = piece.to(full)
        return full
