"""What a table refuses, and that its JSON form loses nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from diffaccel.eval.errors import DataError, ProtocolMismatch
from diffaccel.eval.reports.table import (
    Column,
    Row,
    Table,
    delta_column,
    split_by_protocol,
    table_from_json,
    table_to_json,
)
from diffaccel.eval.statistics.jackknife import Estimate
from tests.eval.report_sample import FD, sample_table


def row(name: str, protocol: str = "p", **values: Estimate | str | None) -> Row:
    return Row(name, {key.replace("_", ":"): value for key, value in values.items()}, protocol, f"text of {protocol}")


def test_json_round_trip_is_lossless() -> None:
    table = sample_table()
    exact = row("third of all", fd=Estimate(1 / 3, 1e-300, 7, -math.inf), fid="inf")
    table = replace(table, rows=(*table.rows, replace(exact, protocol=table.rows[0].protocol, pictures="runs/x")))
    text = table_to_json(table)
    assert table_from_json(text) == table
    assert table_to_json(table_from_json(text)) == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("estimate", [Estimate(math.nan), Estimate(1.0, math.nan), Estimate(1.0, 0.1, 5, math.nan)])
def test_nan_is_refused(estimate: Estimate) -> None:
    with pytest.raises(DataError, match="'fd' of 'a' is NaN"):
        Table("t", (FD,), (row("a", fd=estimate),))


@pytest.mark.parametrize("se", [-0.1, math.inf])
def test_standard_error_must_be_one(se: float) -> None:
    with pytest.raises(DataError, match="standard error of 'fd' of 'a' must be finite"):
        Table("t", (FD,), (row("a", fd=Estimate(1.0, se)),))


def test_mixed_protocols_are_refused_and_can_be_split() -> None:
    rows = [row("a", "p1", fd=Estimate(1.0)), row("b", "p2", fd=Estimate(2.0)), row("c", "p1", fd=Estimate(3.0))]
    with pytest.raises(ProtocolMismatch, match="2 protocols"):
        Table("t", (FD,), tuple(rows))
    tables = split_by_protocol("t", [FD], rows, footnotes=["f"], manifest={"seed": 0})
    assert [[r.name for r in t.rows] for t in tables] == [["a", "c"], ["b"]]
    assert [t.title for t in tables] == ["t (protocol p1)", "t (protocol p2)"]
    assert {(t.footnotes, t.manifest["seed"]) for t in tables} == {(("f",), 0)}
    assert [t.title for t in split_by_protocol("t", [FD], rows[::2])] == ["t"]


def test_differences_to_a_row_of_another_protocol_are_refused() -> None:
    rows = [row("a", "p1", fd=Estimate(1.0)), row("b", "p2", fd=Estimate(2.0), delta_fd=Estimate(1.0, 0.1))]
    with pytest.raises(DataError, match="baseline 'b' differs from itself"):
        split_by_protocol("t", [FD, delta_column(FD)], rows)


@pytest.mark.parametrize(
    ("columns", "rows", "match"),
    [
        ((FD,), (), "no rows"),
        ((FD,), (row("a"), row("a")), "row names must differ from each other; twice: a"),
        ((FD, FD), (row("a"),), "column keys must differ"),
        ((FD,), (row("a", fdd=Estimate(1.0)),), "values without a column: fdd"),
        ((FD,), (row("a", fd=""),), "empty string"),
        ((delta_column(FD),), (row("a"),), "belong to no column"),
    ],
)
def test_what_does_not_fit_together_is_refused(columns: tuple[Column, ...], rows: tuple[Row, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Table("t", columns, rows)


def test_unknown_column_names_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"no column 'x'; it has fd"):
        Table("t", (FD,), (row("a"),)).column("x")
