"""Regions: from masks of any kind to boxes and tokens at each level."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.kernels.boxes import touching
from diffaccel.kernels.region import Region, difference_mask, read_mask

MASK = np.zeros((12, 16), bool)
MASK[3:6, 4:9] = True


def blobs(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for _ in range(rng.integers(1, 6)):
        top, left = int(rng.integers(0, shape[0])), int(rng.integers(0, shape[1]))
        mask[top : top + int(rng.integers(1, 5)), left : left + int(rng.integers(1, 5))] = True
    return mask


def levels(size: tuple[int, int]) -> list[tuple[int, int]]:
    found = [size]
    while max(found[-1]) > 1:
        found.append((-(-found[-1][0] // 2), -(-found[-1][1] // 2)))
    return found


def test_boxes_of_a_region_at_every_level() -> None:
    """Hold the mask, lie in the map, have one size, and do not touch, also with odd sizes."""
    rng = np.random.default_rng(0)
    several = 0
    for _ in range(150):
        size = tuple(rng.integers(6, 70, 2).tolist())
        masks = np.stack([blobs(rng, size) for _ in range(rng.integers(1, 4))])
        at_most, margin = int(rng.integers(1, 5)), int(rng.integers(0, 5))
        sizes = levels(size)[: rng.integers(1, 9)]
        region = Region(
            masks, margin=margin, max_boxes=at_most, dense_above=rng.choice([0.3, 1.0]), coarsest=sizes[-1][0]
        )
        was_dense = False
        for step, level in enumerate(sizes):
            boxes = region.boxes(*level)
            assert not (was_dense and boxes is not None)  # below a dense level all are
            was_dense = boxes is None and step > 0
            if boxes is None:
                continue
            assert boxes.count <= at_most
            for mask, corners in zip(masks, boxes.corners, strict=True):
                placed = {(t, x, t + boxes.height, x + boxes.width) for t, x in corners}
                several += len(placed) > 1
                assert touching(sorted(placed)) is None
                held = np.zeros(level, bool)
                for top, left, bottom, right in placed:
                    assert 0 <= top < bottom <= level[0]
                    assert 0 <= left < right <= level[1]
                    held[top:bottom, left:right] = True
                for y, x in zip(*np.nonzero(mask), strict=True):
                    assert held[y >> step, x >> step]
    assert several > 60


def test_margins() -> None:
    mask = np.zeros((48, 64), bool)
    mask[12:24, 16:36] = True
    region = Region(mask, margin=4)
    boxes = region.boxes(48, 64)
    assert boxes is not None
    assert (boxes.corners, boxes.height, boxes.width) == ((((8, 12),),), 20, 28)
    half, quarter = region.boxes(24, 32), region.boxes(12, 16)  # margins of 4 / 2 + 2 and 4 / 4 + 2
    assert half is not None
    assert (half.corners, half.height, half.width) == ((((2, 4),),), 14, 18)
    assert quarter is not None
    assert (quarter.corners, quarter.height, quarter.width) == ((((0, 1),),), 9, 11)
    assert region.share == 20 * 28 / (48 * 64)


def test_margin_of_odd_levels_is_that_of_even_ones() -> None:
    mask = np.zeros((33, 33), bool)
    mask[16:18, 16:18] = True
    boxes = Region(mask, margin=8).boxes(17, 17)
    assert boxes is not None
    assert boxes.height == 1 + 2 * (4 + 2)


def test_margin_at_finer_levels_is_in_their_own_pixels() -> None:
    boxes = Region(MASK, margin=2).boxes(48, 64)
    assert boxes is not None
    assert (boxes.corners, boxes.height, boxes.width) == ((((10, 14),),), 16, 24)


def test_dense_above_and_below() -> None:
    assert Region(MASK, margin=1, dense_above=0.1).dense
    assert not Region(MASK, margin=1, dense_above=0.2).dense
    region = Region(MASK, margin=1, dense_below=6)
    assert region.boxes(12, 16) is not None
    assert region.boxes(6, 8) is None
    assert region.boxes(3, 4) is None


def test_regions_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing would be edited"):
        Region(np.stack([MASK, np.zeros_like(MASK)]))
    with pytest.raises(ValueError, match="masks are bool"):
        Region(MASK.astype(np.uint8))


def grey(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def stroke(mask: np.ndarray) -> Image.Image:
    """As a page's canvas gives it: paint on nothing."""
    picture = Image.new("RGBA", mask.shape[::-1], (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), mask=grey(mask))
    return picture


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        [MASK],
        MASK.astype(np.uint8) * 255,
        MASK.astype(np.float32),
        MASK.astype(np.int64),
        MASK * 0.8 + 0.1,
        MASK[None, None],
        torch.from_numpy(MASK),
        torch.from_numpy(MASK).bfloat16(),
        torch.from_numpy(MASK)[None, None].float(),
        torch.from_numpy(MASK.astype(np.uint8) * 255),
        grey(MASK),
        grey(MASK).convert("1"),
        grey(MASK).convert("RGB"),
        grey(MASK).convert("P"),
        grey(MASK).convert("RGBA"),
        grey(MASK).convert("LA"),
        Image.fromarray(MASK.astype(np.float32)),
        stroke(MASK),
    ],
    ids=lambda mask: f"{type(mask).__name__}-{getattr(mask, 'dtype', getattr(mask, 'mode', ''))}",
)
def test_every_kind_of_mask(mask: Any) -> None:
    read = read_mask(mask)
    assert read.dtype == bool
    assert read.shape == (1, 12, 16)
    assert (read[0] == MASK).all()


def test_masks_of_a_batch() -> None:
    both = np.stack([MASK, MASK[::-1]])
    for masks in (both, both[:, None], torch.from_numpy(both), [MASK, MASK[::-1]], [grey(MASK), MASK[::-1]]):
        assert (read_mask(masks) == both).all()
    apart = [MASK, np.ones((24, 32), bool)]
    assert read_mask(apart, (6, 8)).shape == (2, 6, 8)


def test_a_cell_is_true_if_any_pixel_in_it_is() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        shape, size = tuple(rng.integers(1, 40, 2).tolist()), tuple(rng.integers(1, 12, 2).tolist())
        mask = rng.random(shape) < 0.1
        read = read_mask(mask, size)[0]
        for y in range(size[0]):
            for x in range(size[1]):
                rows = slice(y * shape[0] // size[0], -(-(y + 1) * shape[0] // size[0]))
                columns = slice(x * shape[1] // size[1], -(-(x + 1) * shape[1] // size[1]))
                assert read[y, x] == mask[rows, columns].any()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("mask.png", TypeError, "not a str"),
        ([[0, 1]], TypeError, "not a int"),
        ([], ValueError, "without masks"),
        (np.zeros(5), ValueError, r"not \(5,\)"),
        (np.zeros((0, 5), bool), ValueError, r"not \(0, 5\)"),
        (np.zeros((64, 64, 3), bool), ValueError, r"not \(64, 64, 3\)"),
        (np.zeros((2, 3, 8, 8), bool), ValueError, r"not \(2, 3, 8, 8\)"),
        (MASK.astype(np.uint8), ValueError, "none above 1; write mask > 0"),
        (MASK * 255.0, ValueError, r"numbers in \[0, 1\], and this one in \[0, 255\]"),
        (MASK * 2.0 - 1, ValueError, r"this one in \[-1, 1\]"),
        ([MASK, MASK[:5]], ValueError, "one size"),
    ],
    ids=str,
)
def test_what_is_no_mask(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_mask(mask)


def test_difference_of_pictures() -> None:
    before = np.random.default_rng(0).integers(0, 200, (12, 16, 3)).astype(np.uint8)
    after = before.copy()
    after[3:6, 4:9, 1] += 6  # 6 / 255 = 0.024
    after[0, 0] += 5  # 5 / 255 = 0.0196
    pairs = [(before, after), (before / 255, after / 255), (before, after / 255.0)]
    pairs.append((Image.fromarray(before), Image.fromarray(after)))
    for a, b in pairs:
        assert (difference_mask(a, b) == MASK).all()
    assert not difference_mask(before, after, threshold=0.03).any()
    assert (difference_mask(before[..., 1], after[..., 1]) == MASK).all()
    with pytest.raises(ValueError, match="of the same size"):
        difference_mask(before, after[:5])


def test_tokens() -> None:
    one, many = np.zeros((9, 11), bool), np.zeros((9, 11), bool)
    one[0, 5] = True
    many[4:6, 3:8] = True
    tokens = Region(np.stack([one, many]), margin=1).tokens()
    assert tokens.shape == (2, 4 * 7)
    assert tokens.dtype == torch.int64
    assert (tokens.diff(dim=1) > 0).all()
    y, x = np.meshgrid(np.arange(3, 7), np.arange(2, 9), indexing="ij")
    assert tokens[1].tolist() == (y * 11 + x).flatten().tolist()
    distance = {int(t): max(t // 11, abs(t % 11 - 5)) for t in range(99)}
    taken = sorted(distance[int(t)] for t in tokens[0])
    assert taken == sorted(distance.values())[: 4 * 7]  # the nearest


def test_tokens_of_a_whole_mask() -> None:
    tokens = Region(np.stack([np.ones((3, 4), bool), np.eye(3, 4, dtype=bool)])).tokens()
    assert tokens.tolist() == [list(range(12))] * 2


def test_what_is_new() -> None:
    inside = Region(MASK).inside()
    assert inside.shape == (1, 1, 12, 16)
    assert (inside[0, 0].numpy() == MASK).all()


def test_drawing_shows_mask_and_boxes() -> None:
    mask = np.zeros((24, 32), bool)
    mask[3:6, 4:9] = mask[20:22, 20:22] = True
    region = Region(mask, margin=1, coarsest=12)
    shown = np.asarray(region.draw(Image.new("L", (320, 240), 255)))
    assert shown.shape == (240, 320, 3)
    blue = (shown == (0, 90, 255)).all(-1)
    boxes = region.boxes(24, 32)
    assert boxes is not None
    assert boxes.count == 2
    expected = np.zeros_like(blue)
    for top, left in boxes.corners[0]:
        rows = slice(10 * top, 10 * (top + boxes.height))
        columns = slice(10 * left, 10 * (left + boxes.width))
        expected[rows, columns] = True
        expected[rows, columns][2:-2, 2:-2] = False
    assert (blue == expected).all()
    tinted = (shown == (255, 145, 145)).all(-1)
    assert (tinted == np.kron(mask, np.ones((10, 10), bool)) & ~blue).all()
    assert (shown[~blue & ~tinted] == 255).all()


def test_boxes_that_touch_far_below_stay_apart() -> None:
    """At a quarter of the resolution they meet; merged they would be most of the picture."""
    mask = np.zeros((64, 96), bool)
    mask[8:18, 10:24] = mask[44:56, 60:82] = True
    region = Region(mask, margin=2, coarsest=16)
    boxes, half = region.boxes(64, 96), region.boxes(32, 48)
    assert boxes is not None
    assert boxes.count == 2
    assert half is not None
    assert half.count == 2
    assert region.boxes(16, 24) is None
    near = np.zeros((32, 48), bool)
    near[4:9, 5:12] = near[15:19, 5:12] = True  # here a merged box costs less than a dense level
    merged, quarter = Region(near, margin=2, coarsest=8).boxes(32, 48), Region(near, margin=2, coarsest=8).boxes(8, 12)
    assert merged is not None
    assert merged.count == 1
    assert quarter is not None
