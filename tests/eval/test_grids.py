"""Which pictures are shown, and that they are those."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from diffaccel.eval.errors import DataError
from diffaccel.eval.reports.grids import random_grid, worst_cases, worst_grid
from diffaccel.eval.reports.table import Column
from diffaccel.pictures import LABEL_WIDTH, MARGIN
from tests.eval.report_sample import PROMPT, PSNR

LPIPS = Column("lpips", "LPIPS", better="lower")
PROMPTS = ["apple", "cat", "car", PROMPT, "sun"]


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[Path]]:
    """Two runs of five pictures; each picture has one grey of its own."""
    found: dict[str, list[Path]] = {}
    for i, name in enumerate(("base", "fast")):
        found[name] = [tmp_path / f"{name}-{j}.png" for j in range(5)]
        for j, path in enumerate(found[name]):
            Image.new("RGB", (64, 64), (10 * j, 100 * i, 0)).save(path)
    return found


def shown(sheet: Image.Image, rows: int, columns: int) -> list[list[tuple[int, ...]]]:
    """Colour in the middle of each picture of a sheet with cells of 128."""
    top = sheet.height - rows * (128 + MARGIN) - MARGIN
    middle = lambda i, j: (LABEL_WIDTH + MARGIN + j * 136 + 64, top + MARGIN + i * 136 + 64)  # noqa: E731
    return [[sheet.getpixel(middle(i, j)) for j in range(columns)] for i in range(rows)]  # pyright: ignore[reportReturnType]


def test_worst_cases_by_psnr_and_by_lpips() -> None:
    numbers = {"a": [30.0, math.inf, 12.0, 25.0], "b": [10.0, 40.0, 20.0, 25.0]}
    assert worst_cases(numbers, PSNR, 3) == [(0, "b"), (2, "a"), (3, "a")]
    assert worst_cases({"a": [0.1, 0.5, 0.3]}, LPIPS, 2) == [(1, "a"), (2, "a")]
    assert len(worst_cases(numbers, PSNR, 9)) == 4


def test_grid_shows_the_worst(runs: dict[str, list[Path]]) -> None:
    grid = worst_grid(runs, PROMPTS, {"fast": [30.0, 9.0, 20.0, 5.0, 40.0]}, PSNR, columns=2)
    assert shown(grid.picture, 2, 2) == [[(30, 0, 0), (10, 0, 0)], [(30, 100, 0), (10, 100, 0)]]
    assert grid.notes == (f"3: {PROMPT} — 5.00 dB with fast", "1: cat — 9.00 dB with fast")
    assert (grid.name, grid.title) == ("grid-worst-psnr", "The 2 worst of 5 pictures by PSNR ↑")


def test_random_choice_is_seeded(runs: dict[str, list[Path]]) -> None:
    grid, again = (random_grid(runs, PROMPTS, columns=3, seed=4) for _ in range(2))
    assert grid.notes == again.notes
    assert grid.picture.tobytes() == again.picture.tobytes()
    assert any(random_grid(runs, PROMPTS, columns=3, seed=s).notes != grid.notes for s in range(4))
    indices = [int(note.partition(":")[0]) for note in grid.notes]
    assert indices == sorted(set(indices))
    assert shown(grid.picture, 2, 3) == [[(10 * i, 100 * k, 0) for i in indices] for k in (0, 1)]
    assert len(random_grid(runs, PROMPTS, columns=9).notes) == 5


def test_pictures_keep_their_shape(tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), "red").save(tmp_path / "wide.png")
    sheet = random_grid({"a": [tmp_path / "wide.png"]}, ["p"]).picture
    column = [sheet.getpixel((LABEL_WIDTH + MARGIN + 64, sheet.height - MARGIN - 128 + y)) for y in (10, 64, 118)]
    assert column == [(200, 200, 200), (255, 0, 0), (200, 200, 200)]


def test_bad_input(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'fast' has 4 pictures for 5 prompts"):
        random_grid(runs | {"fast": runs["fast"][:4]}, PROMPTS)
    (tmp_path / "cut.png").write_bytes(runs["fast"][0].read_bytes()[:60])
    for name in ("cut.png", "absent.png"):
        with pytest.raises(DataError, match=f"{name} cannot be read as a picture"):
            random_grid({"a": [tmp_path / name]}, ["p"])
    with pytest.raises(DataError, match="once per prompt, 5 times"):
        worst_grid(runs, PROMPTS, {"fast": [1.0]}, PSNR)
    with pytest.raises(DataError, match="PSNR is NaN"):
        worst_cases({"a": [1.0, math.nan]}, PSNR, 1)
    with pytest.raises(DataError, match="as many numbers"):
        worst_cases({"a": [1.0], "b": [1.0, 2.0]}, PSNR, 1)
    with pytest.raises(ValueError, match="which way is better"):
        worst_cases({"a": [1.0]}, Column("x", "X"), 1)
