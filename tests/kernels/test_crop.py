"""The crop executor's tensor work, against whole maps and plain indexing."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels import crop
from diffaccel.kernels.boxes import Boxes

SIZES = [(13, 10), (8, 16), (5, 5)]


def random_boxes(rng: np.random.Generator, size: tuple[int, int], masks: int, count: int) -> Boxes:
    height, width = int(rng.integers(1, size[0] + 1)), int(rng.integers(1, size[1] + 1))
    corners = tuple(
        tuple(
            (int(rng.integers(0, size[0] - height + 1)), int(rng.integers(0, size[1] - width + 1)))
            for _ in range(count)
        )
        for _ in range(masks)
    )
    return Boxes(size, height, width, corners)


def some_boxes() -> list[Boxes]:
    """On every size: one and several boxes, of one and of several masks."""
    rng = np.random.default_rng(0)
    return [
        random_boxes(rng, size, masks, count)
        for size in SIZES
        for masks in (1, 2)
        for count in (1, 3)
        for _ in range(4)
    ]


def each(boxes: Boxes, rows: int = 4) -> list[tuple[int, int, int, int]]:
    """Row of the batch, number of the box, top, left."""
    return [(r, k, *boxes.corners[r % len(boxes.corners)][k]) for r in range(rows) for k in range(boxes.count)]


def picture(boxes: Boxes, seed: int = 0) -> Tensor:
    return torch.randn(4, 2, *boxes.map, generator=torch.manual_seed(seed))


def windows_of(full: Tensor, boxes: Boxes) -> Tensor:
    """(B, k, C, h, w), by indexing; beyond the map zeros."""
    around = 50
    padded = F.pad(full, (around,) * 4)
    pieces = [
        padded[r, :, y + around : y + around + boxes.height, x + around : x + around + boxes.width]
        for r, _, y, x in each(boxes, len(full))
    ]
    return torch.stack(pieces).unflatten(0, (len(full), boxes.count))


@pytest.mark.parametrize("boxes", some_boxes(), ids=str)
def test_regions_out_of_maps_and_back(boxes: Boxes) -> None:
    full, new = picture(boxes), picture(boxes, 1)
    strip = crop.crop(full, boxes)
    assert strip.shape == (4, 2, boxes.height, boxes.count * boxes.width)
    pieces = windows_of(full, boxes)
    for r, k, _, _ in each(boxes):
        assert (strip[r, :, :, k * boxes.width : (k + 1) * boxes.width] == pieces[r, k]).all()
    assert (crop.split(strip, boxes) == pieces.flatten(0, 1)).all()
    assert (crop.strip_of(crop.split(strip, boxes), boxes) == strip).all()
    expected = full.clone()
    for r, _, y, x in each(boxes):
        where = (r, slice(None), slice(y, y + boxes.height), slice(x, x + boxes.width))
        expected[where] = new[where]
    kept = full.clone()
    assert (crop.place(full, crop.crop(new, boxes), boxes) == expected).all()
    assert (full == kept).all()  # a copy
    assert crop.write(full, crop.crop(new, boxes), boxes) is full
    assert (full == expected).all()
    assert (crop.place(full.half(), strip, boxes).dtype, crop.cut(full.half(), boxes, like=strip).dtype) == (
        torch.float32,
    ) * 2


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_convolution_of_windows(kernel: int, stride: int) -> None:
    """What the windows give is that part of the whole convolution, at borders too."""
    weight = torch.randn(3, 2, kernel, kernel, generator=torch.manual_seed(0))
    padding = (kernel - 1) // 2
    for at in some_boxes():
        size: Any = tuple(stride * (n - 1) + kernel - 2 * padding for n in at.map)  # of the input
        full = torch.randn(4, 2, *size, generator=torch.manual_seed(1))
        windows = crop.conv_windows(at, size, (kernel, kernel), (stride, stride), (padding, padding))
        assert (crop.cut(full, windows) == windows_of(full, windows).flatten(0, 1)).all()
        out = F.conv2d(crop.cut(full, windows), weight, stride=stride)
        whole = F.conv2d(full, weight, stride=stride, padding=padding)
        torch.testing.assert_close(crop.strip_of(out, at), crop.crop(whole, at), atol=1e-5, rtol=1e-5)


def test_overlay_takes_the_strip_and_leaves_the_rest() -> None:
    rng = np.random.default_rng(0)
    for boxes in some_boxes():
        moved = tuple(
            tuple((y + int(rng.integers(-2, 1)), x + int(rng.integers(-2, 1))) for y, x in row) for row in boxes.corners
        )
        at = Boxes(boxes.map, boxes.height + 3, boxes.width + 2, moved)
        old, new = picture(boxes), picture(boxes, 1)
        result = crop.overlay(crop.cut(old, at), crop.crop(new, boxes), boxes, at).unflatten(0, (4, -1))
        for (r, k, y, x), (_, _, v, u) in zip(each(boxes), each(at), strict=True):
            known = torch.zeros(boxes.map, dtype=torch.bool)
            known[y : y + boxes.height, x : x + boxes.width] = True
            both = torch.where(known, new[r], old[r])
            assert (
                result[r, k] == windows_of(both[None], Boxes(at.map, at.height, at.width, (((v, u),),)))[0, 0]
            ).all()


def test_extended_repeats_the_edge_inside_the_picture() -> None:
    rng = np.random.default_rng(0)
    for boxes in some_boxes():
        moved = tuple(
            tuple((y - int(rng.integers(0, 3)), x - int(rng.integers(0, 3))) for y, x in row) for row in boxes.corners
        )
        at = Boxes(boxes.map, boxes.height + 3, boxes.width + 2, moved)
        strip = crop.crop(picture(boxes), boxes)
        result = crop.extended(strip, boxes, at).unflatten(0, (4, -1))
        for (r, k, y, x), (_, _, v, u) in zip(each(boxes), each(at), strict=True):
            for i in range(at.height):
                for j in range(at.width):
                    if not (0 <= v + i < at.map[0] and 0 <= u + j < at.map[1]):
                        assert (result[r, k, :, i, j] == 0).all()
                        continue
                    row, column = min(max(v + i - y, 0), boxes.height - 1), min(max(u + j - x, 0), boxes.width - 1)
                    assert (result[r, k, :, i, j] == strip[r, :, row, k * boxes.width + column]).all()


@pytest.mark.parametrize("odd", [0, 1])
def test_doubled_windows(odd: int) -> None:
    """As `interpolate` to a map of twice the size, or one less; the window may reach beyond it."""
    rng = np.random.default_rng(0)
    for boxes in some_boxes():
        low = picture(boxes)
        size: Any = tuple(2 * n - odd for n in boxes.map)
        high = F.interpolate(low, size=size, mode="nearest")
        high_boxes = random_boxes(rng, size, len(boxes.corners), boxes.count)
        at = crop.conv_windows(high_boxes, size, (3, 3), (1, 1), (1, 1))
        half = crop.half_windows(at, boxes.map)
        assert (crop.doubled(crop.cut(low, half), half, at) == windows_of(high, at).flatten(0, 1)).all()
