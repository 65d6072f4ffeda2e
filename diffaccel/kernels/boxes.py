"""Rectangles that cover an edit: found, merged, grown, and carried from one resolution to the next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are outside
_MANY = 24  # boxes, of which all pairs can be looked at


@dataclass(frozen=True)
class Boxes:
    """Equally large boxes on a feature map, the same number for each mask of a batch.

    Row `r` of a batch belongs to mask `r % masks`, which is how guidance and `num_images_per_prompt` stack them.

    Attributes:
        map: height and width of the whole map.
        height, width: of each box.
        corners: for each mask, top left corners of its boxes.
    """

    map: tuple[int, int]
    height: int
    width: int
    corners: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def count(self) -> int:
        """Boxes of each mask."""
        return len(self.corners[0])

    @cached_property
    def share(self) -> float:
        """Area of the boxes, as a share of the map."""
        return self.count * self.height * self.width / (self.map[0] * self.map[1])

    def places(self) -> Iterator[tuple[slice, int, int, int]]:
        """Rows of the batch, number of the box, top, left."""
        for mask, corners in enumerate(self.corners):
            rows = slice(mask, None, len(self.corners))
            for number, (top, left) in enumerate(corners):
                yield rows, number, top, left


def bounding_boxes(mask: np.ndarray, at_most: int) -> list[Box]:
    """Boxes that hold all true pixels of `mask`, at most so many: of its connected parts, the cheapest merged first."""
    boxes, gap = _joined(_runs(mask), 0), 0
    while len(boxes) > max(at_most, _MANY):  # noise: near parts first, since below all pairs are looked at
        gap = 2 * gap + 1
        boxes = _joined(boxes, gap)
    while len(boxes) > at_most:
        boxes = merge(boxes, *_cheapest(boxes))
    # Boxes are brought to a common size: merging two is no loss where that makes less area in all.
    while len(boxes) > 1:
        merged = merge(boxes, *_cheapest(boxes))
        if _area(merged) > _area(boxes):
            break
        boxes = merged
    return boxes


def merge(boxes: Sequence[Box], i: int, j: int) -> list[Box]:
    """The boxes with the i-th and the j-th replaced by one that holds both."""
    return [box for k, box in enumerate(boxes) if k not in (i, j)] + [_both(boxes[i], boxes[j])]


def touching(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Two boxes with no pixel between them, where one would need the other's new values; None if all are apart."""
    for i, a in enumerate(boxes):
        for j, b in enumerate(boxes[:i]):
            if _near(a, b, 0):
                return j, i
    return None


def scaled(box: Box, old: tuple[int, int], new: tuple[int, int], margin: int) -> Box:
    """The box on a map of another size, rounded outwards and grown by `margin` pixels of that map, within it."""
    factors = [level_factor(a, b) for a, b in zip(old, new, strict=True)] * 2
    edges = [math.floor(x * f) for x, f in zip(box[:2], factors, strict=False)]
    edges += [math.ceil(x * f) for x, f in zip(box[2:], factors, strict=False)]
    return (
        max(0, edges[0] - margin),
        max(0, edges[1] - margin),
        min(new[0], edges[2] + margin),
        min(new[1], edges[3] + margin),
    )


def same_size(boxes: Sequence[Sequence[Box]], size: tuple[int, int]) -> Boxes:
    """The boxes of each mask, grown to one size and moved into the map; masks with fewer boxes repeat their last."""
    flat = [box for row in boxes for box in row]
    height, width = max(b[2] - b[0] for b in flat), max(b[3] - b[1] for b in flat)
    count = max(len(row) for row in boxes)
    rows = [[*row, *[row[-1]] * (count - len(row))] for row in boxes]
    corners = tuple(tuple((min(b[0], size[0] - height), min(b[1], size[1] - width)) for b in row) for row in rows)
    return Boxes(size, height, width, corners)


def level_factor(old: int, new: int) -> float:
    """Power of two between the rows of two levels; an odd number is halved and rounded up."""
    factor = 1.0
    while old > new:
        old, factor = math.ceil(old / 2), factor / 2
    while old < new:
        old, factor = 2 * old, 2 * factor
    return factor


def _runs(mask: np.ndarray) -> Iterator[Box]:
    """True pixels that follow each other in a row."""
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        for left, right in edges.reshape(-1, 2).tolist():
            yield y, left, y + 1, right


def _joined(boxes: Iterable[Box], gap: int) -> list[Box]:
    """Boxes with at most `gap` pixels between them, also diagonally, become one."""
    apart: list[Box] = []
    for box in boxes:
        while (near := next((other for other in apart if _near(box, other, gap)), None)) is not None:
            apart.remove(near)
            box = _both(box, near)
        apart.append(box)
    return sorted(apart)


def _near(a: Box, b: Box, gap: int) -> bool:
    return a[0] <= b[2] + gap and b[0] <= a[2] + gap and a[1] <= b[3] + gap and b[1] <= a[3] + gap


def _both(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _cheapest(boxes: Sequence[Box]) -> tuple[int, int]:
    pairs = [(i, j) for j in range(len(boxes)) for i in range(j)]
    return min(pairs, key=lambda pair: _area(merge(boxes, *pair)))


def _area(boxes: Sequence[Box]) -> int:
    return len(boxes) * max(b[2] - b[0] for b in boxes) * max(b[3] - b[1] for b in boxes)
