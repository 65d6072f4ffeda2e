"""What every written form of a table has in common: digits, which number is bold, and the footnotes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from diffaccel.eval.reports.table import DELTA, Column, Row, Table, Value
from diffaccel.eval.statistics.jackknife import Estimate

MISSING = "n/a"
NOTHING = "—"
ARROWS = {"lower": "↓", "higher": "↑", "": ""}
SURE = 2.0  # standard errors of a difference from which on it counts


@dataclass(frozen=True)
class Cell:
    """Text of a number: `number` alone may also be "identical", "n/a" or "—".

    Attributes:
        number: the value, or what stands for it.
        error: its standard error without the sign ±, empty if there is none.
        bold: best, and surely so.
        note: number of the footnote with the reason, 0 for none.
    """

    number: str
    error: str = ""
    bold: bool = False
    note: int = 0


@dataclass(frozen=True)
class Line:
    """A row: name, numbers of its footnotes, cells."""

    name: str
    notes: tuple[int, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Layout:
    """A table as text, not yet escaped for any format.

    Attributes:
        headings: title, unit and arrow of each column.
        with_errors: whether a column has a standard error anywhere.
        lines: the rows.
        notes: numbered footnotes, number 1 first.
        remarks: footnotes without a number: how to read the table, its own, the protocol.
    """

    headings: tuple[str, ...]
    with_errors: tuple[bool, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    remarks: tuple[str, ...]


def layout(table: Table) -> Layout:
    """The text of every cell and footnote of a table."""
    notes: dict[str, int] = {}
    number_of = lambda text: notes.setdefault(text, len(notes) + 1)  # noqa: E731 - a reason is told once
    bold = {column.key: surely_best(table, column) for column in table.columns}
    lines = []
    for row in table.rows:
        marks = tuple(number_of(note) for note in row.notes)
        cells = []
        for column in table.columns:
            value = row.values.get(column.key)
            note = number_of(f"{MISSING}: {value}") if isinstance(value, str) else 0
            cells.append(Cell(*_number_and_error(value, column), bold=bold[column.key] is row, note=note))
        lines.append(Line(row.name, marks, tuple(cells)))
    with_errors = tuple(any(line.cells[j].error for line in lines) for j in range(len(table.columns)))
    return Layout(
        tuple(heading(column) for column in table.columns),
        with_errors,
        tuple(lines),
        tuple(notes),
        _remarks(table, any(with_errors), any(bold.values())),
    )


def heading(column: Column) -> str:
    """Title, unit in brackets, and an arrow that shows which way is better."""
    unit = f"({column.unit})" if column.unit else ""
    return " ".join(part for part in (column.title, unit, ARROWS[column.better]) if part)


def fixed(value: float, column: Column) -> str:
    """`value` with the column's digits; differences always have a sign, zero never has a minus."""
    if math.isinf(value):
        return "identical" if value > 0 and column.unit == "dB" and not column.delta else f"{value:g}"
    text = f"{value:.{column.digits}f}"
    if float(text) == 0:
        return text.lstrip("-")
    return f"+{text}" if column.delta and value > 0 else text


def slug(words: str) -> str:
    """A file name of small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def surely_best(table: Table, column: Column) -> Row | None:
    """The row whose number is better than every other row's by more than 2 standard errors of their difference.

    Known are the differences to the baseline, with shared seeds. Two rows that both differ from it, by d1 +- s1 and
    d2 +- s2, differ by d1 - d2 with a standard error of at most s1 + s2, however they are correlated: that bound is
    used. There is no surely best row where a difference or its standard error is not known.
    """
    if column.delta or not column.better or DELTA + column.key not in {c.key for c in table.columns}:
        return None
    sign = 1 if column.better == "lower" else -1
    contest = []
    for row in table.rows:
        value, difference = row.values.get(column.key), row.values.get(DELTA + column.key)
        if not isinstance(value, Estimate) or math.isinf(value.value):
            continue
        if row is table.rows[0]:
            difference = Estimate(0.0, 0.0)
        if not isinstance(difference, Estimate) or difference.se is None:
            return None
        contest.append((sign * value.value, sign * difference.value, difference.se, row))
    if len(contest) < 2:
        return None
    _, d, se, best = min(contest, key=lambda entry: entry[0])
    others = [entry for entry in contest if entry[3] is not best]
    return best if all(other_d - d > SURE * (se + other_se) for _, other_d, other_se, _ in others) else None


def _number_and_error(value: Value, column: Column) -> tuple[str, str]:
    if value is None:
        return NOTHING, ""
    if isinstance(value, str):
        return MISSING, ""
    error = "" if value.se is None or math.isinf(value.value) else f"{value.se:.{column.digits}f}"
    return fixed(value.value, column), error


def _remarks(table: Table, errors: bool, bold: bool) -> tuple[str, ...]:
    remarks = []
    compared = any(c.delta for c in table.columns)
    if compared:
        remarks.append(f"Δ: difference to {table.rows[0].name}, same prompts and seeds.")
    if errors:
        remarks.append("±: one standard error.")
    if compared:
        sure = "better than every other row by more than two standard errors of the difference"
        remarks.append(f"Bold: {sure}." if bold else f"No number is bold, since none is {sure}.")
    row = table.rows[0]
    return *remarks, *table.footnotes, f"Protocol {row.protocol[:8]}: {row.protocol_text}"
