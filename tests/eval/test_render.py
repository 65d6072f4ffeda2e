"""Golden files, escapes, and when a number may be bold."""

from __future__ import annotations

import csv
import io
import math

import pytest

from diffaccel.eval.reports.layout import fixed, layout, surely_best
from diffaccel.eval.reports.render import csv_text, escape_latex, escape_markdown
from diffaccel.eval.reports.table import Column, Row, Table, delta_column
from diffaccel.eval.statistics.jackknife import Estimate
from tests.eval.report_sample import FD, FID, GOLDEN, PSNR, goldens, sample_table


@pytest.mark.parametrize("name", ["report.md", "report.csv", "report.tex", "report.html"])
def test_golden(name: str) -> None:
    assert goldens()[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_latex_escapes() -> None:
    assert escape_latex("_%&#${}") == r"\_\%\&\#\$\{\}"
    assert escape_latex(r"a~b^c\d<e>") == (
        r"a\textasciitilde{}b\textasciicircum{}c\textbackslash{}d\textless{}e\textgreater{}"
    )
    assert escape_latex("[x]*\n--y") == "{[}x{]}{*} -{}-y"  # would be an argument of \\, its star, a dash


def test_markdown_escapes() -> None:
    assert escape_markdown("dpmpp_2m FD[emoji-clip]") == "dpmpp_2m FD[emoji-clip]"  # means nothing there
    assert escape_markdown("_a_ a|b <i> *x* `y` [l](u)\nz") == r"\_a\_ a\|b \<i\> \*x\* \`y\` [l\](u) z"


@pytest.mark.parametrize(
    ("value", "column", "words"),
    [
        (math.inf, PSNR, "identical"),
        (-math.inf, PSNR, "-inf"),
        (math.inf, FD, "inf"),
        (math.inf, delta_column(PSNR), "inf"),
        (-0.0001, FD, "0.000"),
        (-0.0001, delta_column(FD), "0.000"),
        (0.25, delta_column(FD), "+0.250"),
        (-0.25, delta_column(FD), "-0.250"),
        (12345.678, Column("n", "n", digits=0), "12346"),
    ],
)
def test_digits(value: float, column: Column, words: str) -> None:
    assert fixed(value, column) == words


def best(*rows: tuple[float, tuple[float, float | None] | None], better: str = "lower") -> str | None:
    column = Column("fd", "FD", better=better)  # pyright: ignore[reportArgumentType]
    table = Table(
        "t",
        (column, delta_column(column)),
        tuple(
            Row(str(i), {"fd": Estimate(value), "delta:fd": None if d is None else Estimate(*d)}, "p", "")
            for i, (value, d) in enumerate(rows)
        ),
    )
    found = surely_best(table, column)
    return found and found.name


def test_bold_needs_two_standard_errors_of_the_difference() -> None:
    assert best((10, None), (9, (-1, 0.4))) == "1"
    assert best((10, None), (9, (-1, 0.5))) is None
    assert best((10, None), (11, (1, 0.4))) == "0"  # the baseline may be the best one
    assert best((10, None), (11, (1, 0.4)), better="higher") == "1"
    assert best((10, None), (11, (1, 0.4)), better="") is None


def test_bold_is_told_against_every_row() -> None:
    # 8 beats 8.5 by 0.5, whose standard error is at most 0.1 + 0.1
    assert best((10, None), (8, (-2, 0.1)), (8.5, (-1.5, 0.1))) == "1"
    assert best((10, None), (8, (-2, 0.1)), (8.5, (-1.5, 0.2))) is None
    # the next best is told apart, the third one, with a wide error, is not
    assert best((10, None), (8, (-2, 0.1)), (8.5, (-1.5, 0.1)), (9, (-1, 0.5))) is None


def test_nothing_is_bold_without_the_differences() -> None:
    assert best((10, None), (9, None)) is None
    assert best((10, None), (9, (-1, None))) is None
    assert best((10, None)) is None
    assert surely_best(sample_table(), FID) is None
    assert surely_best(sample_table(), PSNR) is None  # has no column of differences


def test_a_reason_is_told_once() -> None:
    shown = layout(sample_table())
    assert shown.notes == ("n/a: no weights in /a_b & c", "x_0 < 1 --fast", "n/a: not timed")
    assert [line.cells[-1].note for line in shown.lines] == [1, 1, 1]


def test_csv_has_every_digit_and_reads_back() -> None:
    third = Table("t", (FD,), (Row('a, "b"', {"fd": Estimate(1 / 3, 0.1, 9)}, "p", ""), Row("c", {"fd": "r"}, "p", "")))
    first, second = csv.DictReader(io.StringIO(csv_text(third)))
    assert (first["method"], float(first["FD[emoji-clip]"]), first["FD[emoji-clip] n"]) == ('a, "b"', 1 / 3, "9")
    assert (second["FD[emoji-clip]"], second["FD[emoji-clip] se"], second["notes"]) == ("n/a", "", "FD[emoji-clip]: r")
