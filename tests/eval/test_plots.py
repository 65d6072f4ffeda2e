"""The Pareto front against the definition, labels that stay apart, ticks, and drawings that are valid XML."""

from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET

import pytest

from diffaccel.eval.errors import DataError
from diffaccel.eval.reports.plots import histogram_plot, pareto_front, pareto_plot
from diffaccel.eval.reports.svg import Axis, overlap, place_labels, tick_label
from diffaccel.eval.reports.table import Row, Table
from diffaccel.eval.statistics.jackknife import Estimate
from tests.eval.report_sample import FD, NASTY, P50, PSNR, sample_table

SVG = "{http://www.w3.org/2000/svg}"


def test_pareto_front() -> None:
    points = [(1, 9), (2, 5), (3, 6), (4, 5), (5, 1), (2, 5), (6, 1)]
    assert pareto_front(points) == [0, 1, 5, 4]  # equal points stay together; (6, 1) costs more than (5, 1) for nothing
    assert pareto_front(points, ("lower", "higher")) == [0]
    assert pareto_front([(1, 1), (2, 2), (3, 2)], ("lower", "higher")) == [0, 1]
    assert pareto_front([(1, 1), (2, 2), (3, 3)], ("higher", "lower")) == [0, 1, 2]
    with pytest.raises(ValueError, match="'lower' or 'higher'"):
        pareto_front(points, ("lower", ""))


def test_pareto_front_is_what_nothing_dominates() -> None:
    rng = random.Random(0)
    points = [(rng.randrange(12), rng.randrange(12)) for _ in range(60)]
    front = pareto_front(points)
    for i, (x, y) in enumerate(points):
        beaten = any((a <= x and b < y) or (a < x and b <= y) for a, b in points)
        assert beaten != (i in front)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_plot_shows_what_it_can_and_names_the_rest() -> None:
    plot = pareto_plot(sample_table(), "p50", "fd")
    root = ET.fromstring(plot.svg)
    assert plot.name == "pareto-p50-fd"
    assert NASTY in plot.note
    assert "er_ode_1" not in plot.note
    kinds = [element.get("class") for element in root.iter()]
    assert kinds.count("dot best") == 2  # the faster one and the better one
    assert kinds.count("bar") == 2
    assert "identical" not in plot.svg
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"FD[emoji-clip] ↓", "dpmpp_2m, 50 steps", "er_ode_1, 8 steps"} <= set(words)


def test_plot_of_nothing_says_so() -> None:
    table = Table("t", (P50, FD), (Row("a", {"p50": Estimate(1.0), "fd": "n"}, "p", ""),))
    plot = pareto_plot(table, "p50", "fd")
    assert "no method has both numbers" in plot.svg
    assert "a." in plot.note
    with pytest.raises(KeyError, match="no column 'lpips'"):
        pareto_plot(table, "p50", "lpips")


def test_names_are_escaped() -> None:
    table = Table("t", (P50, FD), (Row("<b>&", {"p50": Estimate(1.0), "fd": Estimate(1.0, 0.1)}, "p", ""),))
    svg = pareto_plot(table, "p50", "fd").svg
    assert "<b>" not in svg
    assert "<b>&" in [e.text for e in ET.fromstring(svg).iter(f"{SVG}text")]


def test_labels_do_not_overlap() -> None:
    rng = random.Random(1)
    points = [(100 + 60 * rng.random(), 100 + 60 * rng.random()) for _ in range(10)]
    obstacles = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    field = (0.0, 0.0, 600.0, 400.0)
    labels = place_labels([f"solver {i}" for i in range(10)], points, obstacles, field)
    boxes = [label.box for label in labels]
    assert all(overlap(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(overlap(a, b) == 0 for a in boxes for b in obstacles)
    assert all(left >= 0 and top >= 0 and right <= 600 and bottom <= 400 for left, top, right, bottom in boxes)


def test_a_free_label_stands_right_of_its_point_or_left_at_the_border() -> None:
    free, edge = place_labels(["name", "name"], [(50, 50), (195, 120)], [], (0, 0, 200, 200))
    assert free.box[0] > 50
    assert free.point is None
    assert edge.box[2] < 195


@pytest.mark.parametrize(
    ("values", "log_from", "ticks"),
    [
        ([5, 50], 10, (5, 10, 20, 50)),
        ([5, 49], 10, (10, 20, 30, 40, 50)),
        ([0.0, 1.0], 10, (0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        ([1e-5, 1.0], 100, (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
        ([7.0], 10, (6.5, 7.0, 7.5)),
    ],
)
def test_ticks(values: list[float], log_from: float, ticks: tuple[float, ...]) -> None:
    axis = Axis.of(values, 0, 100, log_from=log_from)
    assert axis.ticks == pytest.approx(ticks)
    assert all(0 <= axis(value) <= 100 for value in values)


def test_tick_labels() -> None:
    numbers = (0.30000000000000004, 20, 9000, 15000, 2e6, 1.2e11, 5e-5, 0.0, -0.5)
    assert [tick_label(n) for n in numbers] == ["0.3", "20", "9000", "15k", "2M", "120G", "5e-5", "0", "-0.5"]


def test_histogram_counts_every_picture() -> None:
    values = {"a": [1.0, 1.0, 2.0, math.inf], "b": [3.0, 3.0, 3.0]}
    plot = histogram_plot(values, PSNR)
    root = ET.fromstring(plot.svg)
    words = " ".join(element.text or "" for element in root.iter(f"{SVG}text"))
    assert "a: median 1.50, 1 of 4 identical" in words
    assert "b: median 3.00" in words
    assert "the highest bar is 3" in words
    heights = [float(e.get("height", 0)) for e in root.iter(f"{SVG}rect") if e.get("class") == "bin"]
    assert [round(3 * h / max(heights)) for h in heights] == [2, 1, 3]


@pytest.mark.parametrize("values", [{}, {"a": []}, {"a": [1.0, math.nan]}])
def test_histogram_refuses(values: dict[str, list[float]]) -> None:
    with pytest.raises(DataError, match="histogram of 'PSNR'"):
        histogram_plot(values, PSNR)
