"""A report on disk: tables in every format, plots and picture grids, each file whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffaccel.eval.errors import DataError
from diffaccel.eval.reports.grids import Grid
from diffaccel.eval.reports.html import html_report
from diffaccel.eval.reports.plots import Plot
from diffaccel.eval.reports.render import csv_text, latex, markdown
from diffaccel.eval.reports.table import Table, table_from_dict, table_to_dict
from diffaccel.pictures import save_picture, save_text

FORMATS = ("md", "csv", "json", "tex", "html")
VERSION = 1


def save_report(
    tables: Table | Sequence[Table],
    folder: str | os.PathLike[str],
    formats: Sequence[str] = FORMATS,
    *,
    title: str = "",
    plots: Sequence[Plot] = (),
    grids: Sequence[Grid] = (),
    manifest: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write `report.<format>` for each format, a `.svg` for each plot and a `.png` for each grid; their paths.

    The same input gives the same bytes; each file is written under a temporary name and renamed. CSV has no place for
    a second table: with several it is `report-1.csv`, `report-2.csv`, ...

    Args:
        tables: one table, or one for each protocol (`split_by_protocol`).
        folder: made where it is not there.
        formats: some of `FORMATS`.
        title: heading of the page; the first table's by default.
        plots: see `pareto_plot` and `histogram_plot`.
        grids: see `random_grid` and `worst_grid`.
        manifest: JSON values on the report as a whole.

    Raises:
        ValueError: for an unknown format, no table, or a manifest that has no JSON form.
    """
    tables = [tables] if isinstance(tables, Table) else list(tables)
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not tables:
        problem = f"unknown report format {', '.join(unknown)}; known are" if unknown else "a report needs a table;"
        raise ValueError(f"{problem} {', '.join(FORMATS) if unknown else 'none was given'}")
    title = title or tables[0].title
    record = {
        "diffaccel_report": VERSION,
        "title": title,
        "tables": [table_to_dict(table) for table in tables],
        "manifest": manifest or {},
    }
    record_text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    single = len(tables) == 1
    texts: dict[str, Callable[[], dict[str, str]]] = {
        "md": lambda: {"report.md": "\n".join(map(markdown, tables))},
        "csv": lambda: {f"report{'' if single else f'-{i}'}.csv": csv_text(t) for i, t in enumerate(tables, 1)},
        "json": lambda: {"report.json": record_text},
        "tex": lambda: {"report.tex": "\n".join(map(latex, tables))},
        "html": lambda: {"report.html": html_report(title, tables, plots, grids, manifest)},
    }
    drawings = _distinct([*plots, *grids])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, drawing in drawings.items():
        written.append(folder / (name + (".svg" if isinstance(drawing, Plot) else ".png")))
        if isinstance(drawing, Plot):
            save_text(drawing.svg, written[-1])
        else:
            save_picture(drawing.picture, written[-1])
    for name, text in (file for kind in FORMATS if kind in formats for file in texts[kind]().items()):
        written.append(folder / name)
        save_text(text, written[-1])
    return written


def read_report(file: str | os.PathLike[str]) -> tuple[list[Table], dict[str, Any]]:
    """Tables and manifest of a `report.json`.

    Raises:
        DataError: if it is damaged, or no JSON.
        ValueError: if it is no report, or one of another version.
    """
    try:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{os.fspath(file)} is no report, or damaged: {error}") from None
    version = record.get("diffaccel_report") if isinstance(record, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{os.fspath(file)} is no report of this version of diffaccel (found {version}, not {VERSION})"
        )
    try:
        return [table_from_dict(table) for table in record["tables"]], record["manifest"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{os.fspath(file)} is damaged ({error}); make the report again") from None


def _distinct(drawings: Sequence[Plot | Grid]) -> dict[str, Plot | Grid]:
    """File name -> drawing; the same plot of several tables gets a number."""
    named: dict[str, Plot | Grid] = {}
    for drawing in drawings:
        tries = (drawing.name, *(f"{drawing.name}-{i}" for i in range(2, len(drawings) + 2)))
        named[next(name for name in tries if name not in named)] = drawing
    return named
