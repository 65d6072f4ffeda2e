"""What an edit touches: from a mask of the picture to boxes and tokens at the resolutions of a network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffaccel.kernels.boxes import Boxes, bounding_boxes, level_factor, merge, same_size, scaled, touching

# Pixels that a coarser level's margin has beside its share of `margin`: there they cost little, and convolutions reach
# as far as on the finest one. In benchmarks/sparse_edit.py 2 had less error at equal time than 0, 1 and 4.
CONTEXT = 2


class Region:
    """An edit at the resolution of a network's input, with the boxes of each level, made once.

    A level with 1 / 2^i of the rows has a margin of `margin` / 2^i + 2 pixels, i > 0. Levels where the boxes would
    take more than `dense_above` of the map, or that have at most `dense_below` rows, run dense, and all below them.

    Args:
        masks: bool, (masks, rows, columns) at the resolution of the network's input, or (rows, columns).
        margin: as `max_boxes`, `dense_above` and `dense_below`, see `SparseEditConfig`.
        max_boxes: there.
        dense_above: there.
        dense_below: there.
        coarsest: rows of the network's smallest map. Where boxes touch at a level, they are merged, or it runs dense.
    """

    def __init__(
        self,
        masks: np.ndarray,
        *,
        margin: int = 0,
        max_boxes: int = 4,
        dense_above: float = 1.0,
        dense_below: int = 0,
        coarsest: int = 1,
    ):
        self.masks = masks if masks.ndim == 3 else masks[None]
        if self.masks.ndim != 3 or self.masks.dtype != bool:
            raise ValueError(f"masks are bool, (masks, rows, columns); not {masks.dtype}, {masks.shape}")
        if not self.masks.any(axis=(1, 2)).all():
            raise ValueError("the mask is empty: nothing would be edited; paint what should change in white")
        self.margin, self.size = margin, (self.masks.shape[1], self.masks.shape[2])
        self._dense_above, self._dense_below, self._coarsest = dense_above, dense_below, coarsest
        self._levels: dict[tuple[int, int], Boxes | None] = {}
        self._base = [bounding_boxes(mask, max_boxes) for mask in self.masks]
        self._settle()

    def boxes(self, height: int, width: int) -> Boxes | None:
        """Boxes on a feature map of that size; None if that level runs dense."""
        if (height, width) not in self._levels:
            self._levels[height, width] = self._made(height, width)
        return self._levels[height, width]

    @property
    def share(self) -> float:
        """Area that is recomputed, margin included, as a share of the network's input."""
        return self._at(self.size).share

    @property
    def dense(self) -> bool:
        """Whether it is too large to be worth it: the whole network should run dense."""
        return self.boxes(*self.size) is None

    def inside(self, device: Any = None) -> Tensor:
        """The masks themselves, bool, (masks, 1, rows, columns): where the network's output is new."""
        return torch.from_numpy(self.masks)[:, None].to(device)

    def tokens(self, device: Any = None) -> Tensor:
        """Active tokens in ascending order, long, (masks, n): of the masks and `margin` around them.

        Masks with fewer tokens than others take more of the nearest.
        """
        rings = np.stack([_rings(mask, self.margin) for mask in self.masks]).reshape(len(self.masks), -1)
        count = int((rings <= self.margin).sum(axis=1).max())
        return torch.from_numpy(np.sort(np.argsort(rings, axis=1, kind="stable")[:, :count], axis=1)).to(device)

    def draw(self, picture: Image.Image) -> Image.Image:
        """The picture with the first mask tinted red and the recomputed boxes framed."""
        from PIL import ImageDraw

        shown = picture.convert("RGB")
        mask = Image.fromarray(self.masks[0].astype(np.uint8) * 110).resize(shown.size, Image.Resampling.NEAREST)
        shown.paste((255, 0, 0), mask=mask)
        y, x = shown.height / self.size[0], shown.width / self.size[1]
        boxes = self._at(self.size)
        for top, left in boxes.corners[0]:
            frame = (left * x, top * y, (left + boxes.width) * x - 1, (top + boxes.height) * y - 1)
            ImageDraw.Draw(shown).rectangle(frame, outline=(0, 90, 255), width=max(1, round(x / 4)))
        return shown

    def _made(self, height: int, width: int) -> Boxes | None:
        if any(boxes is None and size[0] > height for size, boxes in self._pyramid()):
            return None
        return self._sparse((height, width))

    def _pyramid(self) -> Iterator[tuple[tuple[int, int], Boxes | None]]:
        """Maps of a U-Net, from its input down."""
        size, boxes = self.size, self._sparse(self.size)
        while True:
            yield size, boxes
            if size[0] <= self._coarsest or size == (1, 1):
                return
            size = (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
            boxes = None if boxes is None else self._sparse(size)  # a level below a dense one is dense

    def _sparse(self, size: tuple[int, int]) -> Boxes | None:
        if size[0] <= self._dense_below:
            return None
        boxes = self._at(size)
        one = boxes.count != self._at(self.size).count  # several boxes became the whole map: strips of k boxes end here
        return None if one or boxes.share > self._dense_above else boxes

    def _at(self, size: tuple[int, int]) -> Boxes:
        factor = min(1.0, level_factor(self.size[0], size[0]))
        margin = math.ceil(self.margin * factor) + (CONTEXT if factor < 1 else 0)
        boxes = same_size([[scaled(box, self.size, size, margin) for box in row] for row in self._base], size)
        return boxes if boxes.share < 1 else Boxes(size, *size, (((0, 0),),) * len(self.masks))

    def _settle(self) -> None:
        """Where boxes touch, each would need the other's new values: merge them, or run that level dense if cheaper."""
        while (hit := self._collision()) is not None:
            size, row, pair = hit
            apart, below = self._base[row], self._dense_below
            self._dense_below = size[0]
            dense = self._cost()
            self._dense_below, self._base[row] = below, merge(apart, *pair)
            if size != self.size and dense < self._cost():
                self._dense_below, self._base[row] = size[0], apart

    def _cost(self) -> float:
        """Shares of the levels, which take about the same time in a U-Net."""
        return sum(1.0 if boxes is None else boxes.share for _, boxes in self._pyramid())

    def _collision(self) -> tuple[tuple[int, int], int, tuple[int, int]] | None:
        """A level, a mask, and two of its boxes that touch there."""
        for size, boxes in self._pyramid():
            if boxes is None:
                return None
            for row, (corners, base) in enumerate(zip(boxes.corners, self._base, strict=True)):
                placed = [(t, x, t + boxes.height, x + boxes.width) for t, x in corners[: len(base)]]
                if (pair := touching(placed)) is not None:
                    return size, row, pair
        return None


def read_mask(mask: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """Masks as bool, (masks, rows, columns).

    Args:
        mask: a PIL picture, an array or tensor of (rows, columns), (masks, rows, columns) or (masks, 1, rows, columns),
            bool, or numbers that mean "edit" in the upper half of their range ([0, 1], or [0, 255] for uint8); or a
            list of these, one for each picture of a batch. Of a PIL picture that is transparent in parts, what is not
            transparent is the mask.
        size: rows and columns that the result should have; a cell is true if any pixel of the mask in it is.

    Raises:
        TypeError: for anything else.
        ValueError: for another shape, or numbers of another range.
    """
    if isinstance(mask, list | tuple):
        if not mask:
            raise ValueError("a list without masks is no mask; give one for each picture")
        masks = [read_mask(one, size) for one in mask]
        if len({one.shape[1:] for one in masks}) != 1:
            raise ValueError(f"masks of a list have one size, these have {[one.shape[1:] for one in masks]}")
        return np.concatenate(masks)
    if isinstance(mask, Image.Image):
        mask = _painted(mask)
    elif isinstance(mask, Tensor):
        mask = mask.detach().float().cpu().numpy() if mask.is_floating_point() else mask.cpu().numpy()
    if not isinstance(mask, np.ndarray):
        raise TypeError(f"a mask is a PIL picture, an array or a tensor, not a {type(mask).__name__}")
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    colours = mask.ndim == 3 and mask.shape[2] in (1, 3, 4) and mask.shape[2] < min(mask.shape[:2])
    if mask.ndim not in (2, 3) or colours or mask.size == 0:
        raise ValueError(f"a mask has the shape (rows, columns) or (masks, rows, columns), not {mask.shape}")
    chosen = _chosen(mask if mask.ndim == 3 else mask[None])
    if size is not None and chosen.shape[1:] != size:
        pooled = F.adaptive_max_pool2d(torch.from_numpy(chosen[:, None].astype(np.float32)), size)
        chosen = pooled[:, 0].numpy() > 0
    return chosen


def _painted(picture: Image.Image) -> np.ndarray:
    """What is not transparent, or, of a picture without transparency, how bright it is."""
    if picture.mode in ("RGBA", "LA"):
        alpha = np.asarray(picture.getchannel("A"))
        if alpha.min() < 255:
            return alpha
    return np.asarray(picture if picture.mode in ("F", "I") else picture.convert("L"))


def _chosen(mask: np.ndarray) -> np.ndarray:
    """The upper half of the numbers' range."""
    if mask.dtype == bool:
        return mask
    highest = mask.max()
    if mask.dtype == np.uint8:
        if highest == 1:
            raise ValueError("a mask of uint8 has numbers up to 255, and this one none above 1; write mask > 0")
        return mask > 127
    if highest > 1 or mask.min() < 0:
        raise ValueError(
            f"a mask of {mask.dtype} has numbers in [0, 1], and this one in [{mask.min():g}, {highest:g}]; write "
            "mask > threshold"
        )
    return mask > 0.5


def difference_mask(before: Any, after: Any, *, threshold: float = 0.02) -> np.ndarray:
    """Where two pictures differ by more than `threshold` of the range in any channel: bool, (rows, columns).

    SIGE's default threshold (2e-2). Pictures are PIL pictures or arrays of (rows, columns, channels), uint8 or [0, 1].
    """
    a, b = (_unit(picture) for picture in (before, after))
    if a.shape != b.shape:
        raise ValueError(f"the pictures have the shapes {a.shape} and {b.shape}; give two of the same size")
    return np.any(np.abs(a - b) > threshold, axis=-1)


def _unit(picture: Any) -> np.ndarray:
    array = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    array = array[..., None] if array.ndim == 2 else array
    return array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)


def _rings(mask: np.ndarray, least: int) -> np.ndarray:
    """Chessboard distance to the mask."""
    grown = torch.from_numpy(mask[None, None].astype(np.float32))
    rings = np.where(mask, 0, mask.size)
    for ring in range(1, max(mask.shape) + least):
        grown = F.max_pool2d(grown, 3, 1, 1)
        rings = np.where((rings == mask.size) & (grown[0, 0].numpy() > 0), ring, rings)
    return rings
