"""The tensor work of the crop executor: windows out of maps, regions into maps.

A *strip* is the form of a region inside the network, (B, C, h, k w): the k boxes of each row side by side. Everything
that works pixel by pixel, or row of the batch by row, works on strips as on maps. Convolutions work on *windows*,
(B k, C, h + halo, w + halo), which are boxes too, that may reach beyond the map. Written with slices alone, so that
only what is read is copied (also from a cache on another device or of another type).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.boxes import Boxes

Pair = tuple[int, int]


def conv_windows(out: Boxes, size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Boxes:
    """What a convolution reads for the boxes `out` of its result, on its input map of `size`; `kernel` dilated."""
    (a, b), (s, t), (p, q) = kernel, stride, padding
    corners = tuple(tuple((y * s - p, x * t - q) for y, x in row) for row in out.corners)
    return Boxes(size, (out.height - 1) * s + a, (out.width - 1) * t + b, corners)


def half_windows(windows: Boxes, size: Pair) -> Boxes:
    """What windows on an upsampled map need of the map with half its rows and columns, `size`."""
    corners = tuple(tuple((y // 2, x // 2) for y, x in row) for row in windows.corners)
    return Boxes(size, windows.height // 2 + 1, windows.width // 2 + 1, corners)


def cut(full: Tensor, at: Boxes, like: Tensor | None = None) -> Tensor:
    """Windows out of a map, (B, C, H, W) -> (B k, C, h, w); zeros beyond the map.

    Args:
        full: the map.
        at: the windows.
        like: tensor whose type and device the result has; `full` by default.
    """
    like = full if like is None else like
    result = like.new_zeros(full.shape[0], at.count, full.shape[1], at.height, at.width)
    for rows, number, y, x in at.places():
        a, b = max(0, -y), min(at.height, full.shape[2] - y)
        c, d = max(0, -x), min(at.width, full.shape[3] - x)
        result[rows, number, :, a:b, c:d] = full[rows, :, y + a : y + b, x + c : x + d]
    return result.flatten(0, 1)


def overlay(result: Tensor, strip: Tensor, boxes: Boxes, at: Boxes) -> Tensor:
    """Write into windows, in place, what a strip knows of them.

    Args:
        result: (B k, C, h, w), the windows.
        strip: (B, C, h', k w'), the region.
        boxes: of the strip.
        at: of the windows, on the same map.
    """
    view = result.unflatten(0, (-1, at.count))
    for (rows, number, y, x), (_, _, v, u) in zip(boxes.places(), at.places(), strict=True):
        a, b = max(y, v), min(y + boxes.height, v + at.height)
        c, d = max(x, u), min(x + boxes.width, u + at.width)
        if a < b and c < d:
            start = number * boxes.width - x
            view[rows, number, :, a - v : b - v, c - u : d - u] = strip[rows, :, a - y : b - y, start + c : start + d]
    return result


def extended(strip: Tensor, boxes: Boxes, at: Boxes) -> Tensor:
    """Windows out of a strip alone: its edge is repeated where the picture goes on, zeros beyond the picture.

    Arguments as of `overlay`.
    """
    pieces = split(strip, boxes).unflatten(0, (-1, boxes.count))
    result = strip.new_zeros(strip.shape[0], at.count, strip.shape[1], at.height, at.width)
    for (rows, number, y, x), (_, _, v, u) in zip(boxes.places(), at.places(), strict=True):
        down = torch.arange(max(v, 0), min(v + at.height, at.map[0]), device=strip.device)
        across = torch.arange(max(u, 0), min(u + at.width, at.map[1]), device=strip.device)
        piece = pieces[rows, number][:, :, (down - y).clamp(0, boxes.height - 1)]
        piece = piece[..., (across - x).clamp(0, boxes.width - 1)]
        a, c = max(0, -v), max(0, -u)
        result[rows, number, :, a : a + len(down), c : c + len(across)] = piece
    return result.flatten(0, 1)


def doubled(low: Tensor, half: Boxes, at: Boxes) -> Tensor:
    """Windows on a map with twice the rows and columns (nearest neighbour), out of those of `half_windows`."""
    high = F.interpolate(low, scale_factor=2.0, mode="nearest").unflatten(0, (-1, at.count))
    result = low.new_zeros(high.shape[0], at.count, low.shape[1], at.height, at.width)
    for (rows, number, y, x), (_, _, v, u) in zip(at.places(), half.places(), strict=True):
        b, d = min(at.height, at.map[0] - y), min(at.width, at.map[1] - x)  # an odd map ends earlier
        top, left = y - 2 * v, x - 2 * u
        result[rows, number, :, :b, :d] = high[rows, number, :, top : top + b, left : left + d]
    return result.flatten(0, 1)


def crop(full: Tensor, boxes: Boxes) -> Tensor:
    """A map's region, (B, C, H, W) -> (B, C, h, k w)."""
    return strip_of(cut(full, boxes), boxes)


def place(full: Tensor, strip: Tensor, boxes: Boxes) -> Tensor:
    """A copy of a map, (B, C, H, W), with the region replaced."""
    return write(full.to(strip, copy=True), strip, boxes)


def write(full: Tensor, strip: Tensor, boxes: Boxes) -> Tensor:
    """Replace the region of a map, (B, C, H, W), in place."""
    for rows, number, y, x in boxes.places():
        piece = strip[rows, :, :, number * boxes.width : (number + 1) * boxes.width]
        full[rows, :, y : y + boxes.height, x : x + boxes.width] = piece.to(full)
    return full


def strip_of(pieces: Tensor, boxes: Boxes) -> Tensor:
    """(B k, C, h, w) -> (B, C, h, k w)."""
    if boxes.count == 1:
        return pieces
    return pieces.unflatten(0, (-1, boxes.count)).permute(0, 2, 3, 1, 4).flatten(3)


def split(strip: Tensor, boxes: Boxes) -> Tensor:
    """(B, C, h, k w) -> (B k, C, h, w)."""
    if boxes.count == 1:
        return strip
    return strip.unflatten(3, (boxes.count, boxes.width)).permute(0, 3, 1, 2, 4).flatten(0, 1)
