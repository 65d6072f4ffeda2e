"""Reports on disk: all files, the same bytes each time, and back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from diffaccel.eval.reports.grids import Grid
from diffaccel.eval.reports.plots import pareto_plot
from diffaccel.eval.reports.report import read_report, save_report
from tests.eval.report_sample import sample_table


def test_all_files_and_the_same_bytes(tmp_path: Path) -> None:
    table = sample_table()
    plot, grid = pareto_plot(table, "p50", "fd"), Grid("grid", "g", Image.new("RGB", (4, 4)), ())
    for folder in ("a", "b"):
        written = save_report(table, tmp_path / folder, plots=[plot, plot], grids=[grid], manifest={"seed": 0})
        assert sorted(written) == sorted((tmp_path / folder).iterdir())  # nothing temporary is left
    names = [path.name for path in written]
    kinds = ["report.md", "report.csv", "report.json", "report.tex", "report.html"]
    assert names == ["pareto-p50-fd.svg", "pareto-p50-fd-2.svg", "grid.png", *kinds]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_report_reads_back(tmp_path: Path) -> None:
    tables = [sample_table(), replace(sample_table(), title="other")]
    written = save_report(tables, tmp_path, ("json", "csv"), manifest={"seed": 0})
    assert [path.name for path in written] == ["report-1.csv", "report-2.csv", "report.json"]
    assert read_report(tmp_path / "report.json") == (tables, {"seed": 0})


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown report format pdf; known are md, csv"):
        save_report(sample_table(), tmp_path, ("pdf",))
    with pytest.raises(ValueError, match="a report needs a table"):
        save_report([], tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        save_report(sample_table(), tmp_path / "new", manifest={"loss": math.nan})
    assert not (tmp_path / "new").exists()
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no report of this version"):
        read_report(tmp_path / "other.json")
