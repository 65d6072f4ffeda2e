"""Pictures of pictures: a labelled grid, drawn with Pillow alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL_WIDTH = 8, 250


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    cell: int = 128,
) -> Image.Image:
    """One row of pictures per label, each picture scaled to `cell` x `cell` pixels; labels may hold line breaks."""
    font = ImageFont.load_default(size=15)
    top = 22 + 17 * max(label.count("\n") + 1 for label in column_labels)
    size = (LABEL_WIDTH + len(column_labels) * (cell + MARGIN) + MARGIN, top + len(rows) * (cell + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for j, label in enumerate(column_labels):
        x = LABEL_WIDTH + MARGIN + j * (cell + MARGIN)
        draw.multiline_text((x + cell / 2, MARGIN), label, fill="black", font=font, anchor="ma", align="center")
    for i, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + MARGIN + i * (cell + MARGIN)
        draw.multiline_text((MARGIN, y + cell / 2), label, fill="black", font=font, anchor="lm", spacing=5)
        for j, picture in enumerate(pictures):
            # Small pictures are enlarged pixel by pixel to near the cell, so that nothing is smoothed away.
            whole = max(1, cell // picture.width)
            enlarged = picture.resize((picture.width * whole, picture.height * whole), Image.Resampling.NEAREST)
            sheet.paste(enlarged.resize((cell, cell)), (LABEL_WIDTH + MARGIN + j * (cell + MARGIN), y))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG under a temporary name and rename it, so that no half-written file is ever seen."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    picture.save(scratch, format="PNG")
    os.replace(scratch, path)


def save_text(text: str, path: Path) -> None:
    """Write a text file under a temporary name and rename it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
