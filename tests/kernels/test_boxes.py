"""Boxes around edits: what they hold, and what they keep apart."""

import numpy as np
import pytest

from diffaccel.kernels.boxes import Boxes, bounding_boxes, level_factor, merge, same_size, scaled, touching


def painted(boxes: list, shape: tuple[int, int]) -> np.ndarray:
    filled = np.zeros(shape, bool)
    for top, left, bottom, right in boxes:
        filled[top:bottom, left:right] = True
    return filled


def random_mask(rng: np.random.Generator) -> np.ndarray:
    shape = tuple(rng.integers(1, 40, 2))
    return rng.random(shape) < rng.choice([0.003, 0.02, 0.2, 1.0])


@pytest.mark.parametrize("at_most", [1, 2, 4])
def test_boxes_hold_every_pixel_and_are_few(at_most: int) -> None:
    rng = np.random.default_rng(at_most)
    for _ in range(60):
        mask = random_mask(rng)
        boxes = bounding_boxes(mask, at_most)
        assert len(boxes) <= at_most
        assert not (mask & ~painted(boxes, mask.shape)).any()
        for top, left, bottom, right in boxes:  # none is larger than what it holds
            inside = mask[top:bottom, left:right]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_parts_are_found_one_by_one() -> None:
    mask = np.zeros((20, 30), bool)
    mask[1:4, 2:5] = mask[10:13, 20:23] = True
    mask[4, 5] = True  # diagonally next to the first
    assert sorted(bounding_boxes(mask, 4)) == [(1, 2, 5, 6), (10, 20, 13, 23)]
    assert bounding_boxes(mask, 1) == [(1, 2, 13, 23)]


def test_a_spiral_is_one_part() -> None:
    mask = np.zeros((7, 7), bool)
    mask[0, :6] = mask[:6, 6] = mask[6, 1:] = mask[2:6, 0] = mask[2, :4] = True  # ends that meet only far away
    assert bounding_boxes(mask, 4) == [(0, 0, 7, 7)]


def test_the_cheapest_pair_is_merged() -> None:
    mask = np.zeros((40, 40), bool)
    mask[0:3, 0:3] = mask[0:3, 5:8] = mask[36:39, 36:39] = True
    assert sorted(bounding_boxes(mask, 2)) == [(0, 0, 3, 8), (36, 36, 39, 39)]


def test_boxes_are_merged_where_that_is_less_area() -> None:
    mask = np.zeros((40, 40), bool)
    mask[0:20, 0:20] = True
    mask[22, 3] = True  # would become a box of 20 x 20 too
    assert bounding_boxes(mask, 4) == [(0, 0, 23, 20)]


def test_noise_takes_no_pairs_of_pairs() -> None:
    """1600 single pixels: all pairs of them, again and again, would take hours."""
    mask = np.zeros((160, 160), bool)
    mask[::4, ::4] = True
    boxes = bounding_boxes(mask, 4)
    assert len(boxes) <= 4
    assert not (mask & ~painted(boxes, mask.shape)).any()


def test_touching_boxes() -> None:
    assert touching([(0, 0, 2, 2), (2, 2, 4, 4)]) == (0, 1)  # at a corner
    assert touching([(0, 0, 2, 2), (9, 9, 10, 10), (0, 2, 2, 4)]) == (0, 2)
    assert touching([(0, 0, 2, 2), (3, 0, 4, 4), (0, 3, 2, 4)]) is None
    assert merge([(0, 0, 2, 2), (9, 9, 10, 10), (0, 2, 2, 4)], 0, 2) == [(9, 9, 10, 10), (0, 0, 2, 4)]


def test_level_factor_follows_the_halvings() -> None:
    for size in range(1, 300):
        level, factor = size, 1.0
        while level > 1:
            level, factor = -(-level // 2), factor / 2
            assert level_factor(size, level) == factor
    assert level_factor(8, 64) == 8.0
    assert level_factor(9, 4) == 0.5  # rounded down, as average pooling does


def test_scaled_boxes_hold_what_the_box_holds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = int(rng.integers(1, 70))
        top, left = rng.integers(0, size, 2).tolist()
        bottom, right = int(rng.integers(top, size)) + 1, int(rng.integers(left, size)) + 1
        level, step = size, 1
        while level > 1:
            level, step = -(-level // 2), step * 2
            margin = int(rng.integers(0, 4))
            a, b, c, d = scaled((top, left, bottom, right), (size, size), (level, level), margin)
            assert (a, b) == (max(0, top // step - margin), max(0, left // step - margin))
            assert (c, d) == (min(level, -(-bottom // step) + margin), min(level, -(-right // step) + margin))


def test_finer_levels_double_the_box() -> None:
    assert scaled((1, 2, 3, 4), (8, 8), (32, 32), 3) == (1, 5, 15, 19)


def test_common_size_inside_the_map() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        size = tuple(rng.integers(4, 30, 2).tolist())
        rows = []
        for _ in range(rng.integers(1, 4)):
            row = []
            for _ in range(rng.integers(1, 4)):
                top, left = int(rng.integers(0, size[0])), int(rng.integers(0, size[1]))
                row.append((top, left, int(rng.integers(top, size[0])) + 1, int(rng.integers(left, size[1])) + 1))
            rows.append(row)
        boxes = same_size(rows, size)
        assert boxes.count == max(map(len, rows))
        assert {len(row) for row in boxes.corners} == {boxes.count}
        for row, corners in zip(rows, boxes.corners, strict=True):
            for box, (top, left) in zip([*row, *[row[-1]] * (boxes.count - len(row))], corners, strict=True):
                assert 0 <= top <= box[0]
                assert box[2] <= top + boxes.height <= size[0]
                assert 0 <= left <= box[1]
                assert box[3] <= left + boxes.width <= size[1]


def test_places_go_by_mask_then_by_box() -> None:
    boxes = Boxes((9, 9), 2, 3, (((0, 0), (5, 5)), ((1, 1), (6, 6))))
    assert list(boxes.places()) == [
        (slice(0, None, 2), 0, 0, 0),
        (slice(0, None, 2), 1, 5, 5),
        (slice(1, None, 2), 0, 1, 1),
        (slice(1, None, 2), 1, 6, 6),
    ]
    assert boxes.share == 2 * 6 / 81
