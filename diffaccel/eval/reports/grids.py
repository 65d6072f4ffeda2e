"""Pictures of the same prompts and seeds side by side: some drawn by lot, and those on which a method did worst."""

from __future__ import annotations

import os
import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffaccel.eval.errors import DataError
from diffaccel.eval.reports.layout import ARROWS, fixed, slug
from diffaccel.eval.reports.table import Column
from diffaccel.pictures import labelled_grid

LABEL_CHARACTERS = 28  # a line of a row's label, in the width that `labelled_grid` gives it
Paths = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Grid:
    """A sheet of pictures, rows = methods, columns = prompts.

    Attributes:
        name: file name without `.png`.
        title: heading.
        picture: the sheet.
        notes: what each column shows, in words; prompts in full.
    """

    name: str
    title: str
    picture: Image.Image
    notes: tuple[str, ...]


def random_grid(runs: Mapping[str, Paths], prompts: Sequence[str], *, columns: int = 6, seed: int = 0) -> Grid:
    """Pictures drawn by lot, without a look at them.

    Args:
        runs: method -> PNG files, one per prompt and in their order; the baseline first.
        prompts: prompt of each file.
        columns: pictures of each method, at most.
        seed: of the draw.

    Raises:
        DataError: if a method has not one file per prompt, or a file cannot be read.
    """
    chosen = sorted(random.Random(seed).sample(range(len(prompts)), min(columns, len(prompts))))
    sheet = _sheet(runs, prompts, chosen, [""] * len(chosen))
    notes = tuple(f"{i}: {prompts[i]}" for i in chosen)
    return Grid(f"grid-random-{seed}", f"{len(chosen)} of {len(prompts)} pictures, drawn by lot", sheet, notes)


def worst_grid(
    runs: Mapping[str, Paths],
    prompts: Sequence[str],
    numbers: Mapping[str, Sequence[float]],
    column: Column,
    *,
    columns: int = 6,
) -> Grid:
    """The pictures on which any method is farthest from the baseline, the worst first.

    Args:
        runs: method -> PNG files, one per prompt and in their order; the baseline first.
        prompts: prompt of each file.
        numbers: method -> number of each picture compared with the baseline's (PSNR, LPIPS, CLIP distance); methods
            that are not named do not take part in the choice.
        column: what the numbers are; `better` decides which end is the worst.
        columns: pictures of each method, at most.

    Raises:
        DataError: if a method has not one file and number per prompt, a number is NaN, or a file cannot be read.
    """
    if any(len(found) != len(prompts) for found in numbers.values()):
        raise DataError(f"{column.title} must be given once per prompt, {len(prompts)} times, for every method")
    chosen = worst_cases(numbers, column, columns)
    told = {i: f"{fixed(numbers[name][i], column)} {column.unit}".strip() for i, name in chosen}
    sheet = _sheet(runs, prompts, list(told), list(told.values()))
    notes = tuple(f"{i}: {prompts[i]} — {told[i]} with {name}" for i, name in chosen)
    title = f"The {len(chosen)} worst of {len(prompts)} pictures by {column.title} {ARROWS[column.better]}"
    return Grid(slug(f"grid worst {column.key}"), title, sheet, notes)


def worst_cases(numbers: Mapping[str, Sequence[float]], column: Column, count: int) -> list[tuple[int, str]]:
    """(index, method) of the `count` pictures with the worst number of any method, the worst first.

    Raises:
        DataError: if numbers are missing or NaN, or methods have different numbers of them.
        ValueError: if the column does not say which way is better.
    """
    if not column.better:
        raise ValueError(f"column {column.key!r} does not say which way is better, so that nothing is the worst")
    names = list(numbers)
    if not names or len({len(found) for found in numbers.values()}) > 1:
        raise DataError("the worst pictures can be told only with as many numbers for each method")
    values = np.array([numbers[name] for name in names], dtype=np.float64)
    if np.isnan(values).any():
        raise DataError(f"a picture's {column.title} is NaN: the measurement failed")
    badness = values if column.better == "lower" else -values
    order = np.argsort(-badness.max(0), kind="stable")[:count]
    return [(int(i), names[int(badness[:, i].argmax())]) for i in order]


def _sheet(
    runs: Mapping[str, Paths], prompts: Sequence[str], chosen: Sequence[int], told: Sequence[str]
) -> Image.Image:
    for name, files in runs.items():
        if len(files) != len(prompts):
            raise DataError(f"{name!r} has {len(files)} pictures for {len(prompts)} prompts; they must go together")
    rows = [[_read(files[i]) for i in chosen] for files in runs.values()]
    side = max((max(picture.size) for row in rows for picture in row), default=128)
    cell = min(256, max(128, side))
    words = [_wrapped(f"{i}: {prompts[i]}", cell // 8, 3) for i in chosen]
    labels = [f"{word}\n{number}" if number else word for word, number in zip(words, told, strict=True)]
    return labelled_grid(rows, [_wrapped(name, LABEL_CHARACTERS, 5) for name in runs], labels, cell=cell)


def _read(path: str | os.PathLike[str]) -> Image.Image:
    """A picture as RGB, on a grey square if it is none itself, so that the sheet does not distort it."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read as a picture: {error}") from error
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    square = Image.new("RGB", (side, side), (200, 200, 200))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _wrapped(words: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(words, width, max_lines=lines, placeholder=" …"))
