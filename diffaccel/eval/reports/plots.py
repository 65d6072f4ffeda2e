"""Plots as SVG, without a plotting library: quality against cost with its Pareto front, and histograms.

They follow the reader's light or dark mode, in a page and as files of their own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from diffaccel.eval.errors import DataError
from diffaccel.eval.reports.layout import fixed, heading, slug
from diffaccel.eval.reports.svg import Axis, Box, document, line, place_labels, shortened, text, tick_label
from diffaccel.eval.reports.table import Column, Table
from diffaccel.eval.statistics.jackknife import Estimate

WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 34, 54  # margins of the plotted field, in pixels
BAR = 2.0  # standard errors that an error bar shows on either side
BINS, STRIP = 24, 62  # bins of a histogram, height of one method's strip in pixels


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        name: file name without `.svg`.
        title: heading.
        svg: the drawing, a whole SVG document.
        note: what is not in it, and why.
    """

    name: str
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class _Point:
    name: str
    x: float
    y: float
    bar: float
    front: bool
    baseline: bool


def pareto_front(points: Sequence[tuple[float, float]], better: tuple[str, str] = ("lower", "lower")) -> list[int]:
    """Indices of the points that no other point beats, from left to right.

    A point is beaten by one that is at least as good in both numbers and better in one; equal points stay together.

    Args:
        points: (x, y) numbers.
        better: "lower" or "higher" for x and for y.

    Raises:
        ValueError: for another direction.
    """
    if not set(better) <= {"lower", "higher"}:
        raise ValueError(f"a Pareto front needs 'lower' or 'higher' for both numbers, not {better}")
    sx, sy = (1 if word == "lower" else -1 for word in better)
    costs = [(sx * x, sy * y) for x, y in points]
    beaten = [any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in costs) for p in costs]
    return sorted((i for i, b in enumerate(beaten) if not b), key=lambda i: points[i])


def pareto_plot(table: Table, x: str, y: str) -> Plot:
    """Quality against cost: one point per row, error bars of two standard errors, the Pareto front dashed.

    Rows without both numbers, or with an infinite one, are named in the plot's note.

    Args:
        table: the rows; the baseline is a square.
        x: key of the cost column (latency, NFE, MACs); lower is better unless the column says otherwise.
        y: key of the quality column.

    Raises:
        KeyError: if there is no such column.
        ValueError: if the y column does not say which way is better.
    """
    cost, quality = table.column(x), table.column(y)
    if not quality.better:
        raise ValueError(f"column {y!r} does not say which way is better, so that it has no Pareto front")
    pairs = {row.name: (row.values.get(x), row.values.get(y)) for row in table.rows}
    shown = {
        name: (a.value, b.value, BAR * (b.se or 0.0))
        for name, (a, b) in pairs.items()
        if isinstance(a, Estimate) and isinstance(b, Estimate) and math.isfinite(a.value) and math.isfinite(b.value)
    }
    front = pareto_front([(a, b) for a, b, _ in shown.values()], (cost.better or "lower", quality.better))
    points = [
        _Point(name, a, b, bar, i in front, name == table.rows[0].name)
        for i, (name, (a, b, bar)) in enumerate(shown.items())
    ]
    missing = [name for name in pairs if name not in shown]
    note = f"Without a finite number for both, and so not in the plot: {', '.join(missing)}." if missing else ""
    title = f"{quality.title} against {cost.title}"
    body = _pareto_body(points, cost, quality) if points else [text(LEFT, TOP, "no method has both numbers", "soft")]
    return Plot(slug(f"pareto {x} {y}"), title, document(WIDTH, HEIGHT, title, body), note)


def _pareto_body(points: Sequence[_Point], cost: Column, quality: Column) -> list[str]:
    ax = Axis.of([p.x for p in points], LEFT, WIDTH - RIGHT, log_from=10)
    ay = Axis.of([p.y + side * p.bar for p in points for side in (-1, 1)], HEIGHT - BOTTOM, TOP, log_from=100)
    places = [(ax(p.x), ay(p.y)) for p in points]
    body = _frame(ax, ay, heading(cost), heading(quality))
    front = sorted(place for place, p in zip(places, points, strict=True) if p.front)
    body += [line(*a, *b, "front") for a, b in pairwise(front)]
    bars = [_bar(px, ay(p.y + p.bar), ay(p.y - p.bar)) for (px, _), p in zip(places, points, strict=True)]
    body += [drawn for (drawn, _), p in zip(bars, points, strict=True) if p.bar]
    names = [shortened(p.name) for p in points]
    field = (LEFT + 3, TOP + 2, WIDTH - 4, HEIGHT - BOTTOM - 3)
    obstacles = [*(box for _, box in bars), *(box for a, b in pairwise(front) for box in _along(a, b))]
    labels = place_labels(names, places, obstacles, field)
    body += [line(*place, *label.point, "lead") for place, label in zip(places, labels, strict=True) if label.point]
    body += [_dot(place, p, cost, quality) for place, p in zip(places, points, strict=True)]
    body += [label.text(name) for label, name in zip(labels, names, strict=True)]
    key = "filled: on the Pareto front; square: baseline" + ("; bars: ± 2 SE" if any(p.bar for p in points) else "")
    return [*body, text(LEFT, 18, key, "soft")]


def _frame(ax: Axis, ay: Axis, x_title: str, y_title: str) -> list[str]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    body = [line(ax(t), TOP, ax(t), floor, "grid") for t in ax.ticks]
    body += [line(LEFT, ay(t), right, ay(t), "grid") for t in ay.ticks]
    body += [line(LEFT, floor, right, floor, "axis"), line(LEFT, TOP, LEFT, floor, "axis")]
    body += [text(ax(t), floor + 18, tick_label(t), "soft", "middle") for t in ax.ticks]
    body += [text(LEFT - 7, ay(t) + 4, tick_label(t), "soft", "end") for t in ay.ticks]
    scale = ", log scale"
    body.append(text((LEFT + right) / 2, HEIGHT - 12, x_title + scale * ax.log, "", "middle"))
    body.append(text(20, (TOP + floor) / 2, y_title + scale * ay.log, "", "middle", turn=True))
    return body


def _bar(x: float, top: float, bottom: float) -> tuple[str, Box]:
    """An error bar, and the rectangle that it takes together with its point."""
    drawn = f'<path class="bar" d="M{x - 4:.1f} {top:.1f}h8m-4 0V{bottom:.1f}m-4 0h8"/>'
    return drawn, (x - 6, min(top, (top + bottom) / 2 - 6), x + 6, max(bottom, (top + bottom) / 2 + 6))


def _along(a: tuple[float, float], b: tuple[float, float]) -> list[Box]:
    """Small squares along a line, so that labels avoid it where they can."""
    n = 1 + int(math.dist(a, b) // 6)
    middles = [(a[0] + (b[0] - a[0]) * i / n, a[1] + (b[1] - a[1]) * i / n) for i in range(n + 1)]
    return [(x - 1, y - 1, x + 1, y + 1) for x, y in middles]


def _dot(place: tuple[float, float], point: _Point, cost: Column, quality: Column) -> str:
    kind = "dot best" if point.front else "dot"
    words = (
        f"{point.name}: {fixed(point.x, cost)} {cost.unit}, {quality.title} {fixed(point.y, quality)} {quality.unit}"
    )
    hint = f"<title>{escape(' '.join(words.split()))}</title>"
    x, y = place
    if point.baseline:
        return f'<rect class="{kind}" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10">{hint}</rect>'
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{hint}</circle>'


def histogram_plot(values: Mapping[str, Sequence[float]], column: Column) -> Plot:
    """How a number per picture is spread: one strip per method, all with the same axis and bins.

    Args:
        values: method -> number of each picture; infinite ones (identical pictures) are counted apart.
        column: what is measured.

    Raises:
        DataError: if a method has no numbers, or one is NaN.
    """
    if not values or not all(map(len, values.values())) or any(math.isnan(x) for xs in values.values() for x in xs):
        raise DataError(f"a histogram of {column.title!r} needs numbers for every method, none of them NaN")
    finite = {name: [float(x) for x in xs if math.isfinite(x)] for name, xs in values.items()}
    every = [x for xs in finite.values() for x in xs] or [0.0]
    low, span = min(every), (max(every) - min(every)) or abs(max(every)) or 1.0
    axis = Axis.of([low, low + span], LEFT, WIDTH - RIGHT, log_from=math.inf)
    counts = {name: _counts(xs, low, span) for name, xs in finite.items()}
    highest = max(1, *(n for bins in counts.values() for n in bins))
    height = TOP + STRIP * len(values) + BOTTOM
    floor = height - BOTTOM
    body = [line(axis(t), TOP, axis(t), floor, "grid") for t in axis.ticks]
    body += [text(axis(t), floor + 18, tick_label(t), "soft", "middle") for t in axis.ticks]
    for k, (name, bins) in enumerate(counts.items(), 1):
        words = f"{shortened(name, 48)}: median {fixed(statistics.median(values[name]), column)}"
        identical = len(values[name]) - len(finite[name])
        words += f", {identical} of {len(values[name])} identical" if identical else ""
        body += _strip(bins, highest, axis(low), axis(low + span), TOP + STRIP * k)
        body.append(text(LEFT + 3, TOP + STRIP * (k - 1) + 16, words))
    body.append(text((LEFT + WIDTH - RIGHT) / 2, height - 12, heading(column), "", "middle"))
    body.append(text(LEFT, 18, f"pictures in each bin; the highest bar is {highest}", "soft"))
    title = f"{column.title}, picture by picture"
    return Plot(slug(f"histogram {column.key}"), title, document(WIDTH, height, title, body))


def _counts(values: Sequence[float], low: float, span: float) -> list[int]:
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int((value - low) / span * BINS))] += 1
    return counts


def _strip(bins: Sequence[int], highest: int, left: float, right: float, floor: float) -> list[str]:
    wide = (right - left) / BINS
    drawn = []
    for j, n in enumerate(bins):
        if n:
            tall = (STRIP - 24) * n / highest
            place = f'x="{left + j * wide:.1f}" y="{floor - tall:.1f}" width="{wide - 1:.1f}" height="{tall:.1f}"'
            drawn.append(f'<rect class="bin" {place}/>')
    return [*drawn, line(LEFT, floor, WIDTH - RIGHT, floor, "axis")]
