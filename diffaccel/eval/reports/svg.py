"""Pieces of a plot as SVG text: the sheet with its colours, axes with sensible ticks, labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

EM = 13.0  # font size, pixels
STYLE = """
.da{font:13px system-ui,sans-serif;--paper:#fff;--ink:#1d2530;--soft:#5c6775;--line:#e3e7ec;--mark:#0b66c3}
.da .paper{fill:var(--paper)}
.da text{fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.da .soft{fill:var(--soft)}
.da .grid{stroke:var(--line)}
.da .axis{stroke:var(--soft)}
.da .front{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:5 4;fill:none}
.da .bar{stroke:var(--soft);fill:none}
.da .dot{fill:var(--paper);stroke:var(--soft);stroke-width:1.8}
.da .dot.best{fill:var(--mark);stroke:var(--mark)}
.da .bin{fill:var(--mark)}
.da .lead{stroke:var(--soft);stroke-width:.8;fill:none}
@media(prefers-color-scheme:dark){
.da{--paper:#161b22;--ink:#e6ebf1;--soft:#9aa6b5;--line:#29313b;--mark:#6cb2ff}
}
"""
_GAPS = (10, 20, 32, 46, 62, 80)  # distances of a label from its point that are tried, pixels
_SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """Numbers -> pixels.

    Attributes:
        low: number at the start.
        high: number at the end.
        start: pixel of `low`.
        end: pixel of `high`.
        log: whether the scale is logarithmic.
        ticks: round numbers within.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, log_from: float) -> Axis:
        """Axis around `values` with a margin; logarithmic if all are positive and max / min reaches `log_from`."""
        low, high = min(values), max(values)
        log = low > 0 and high / low >= log_from
        if log:
            margin = (high / low) ** 0.06
            low, high = low / margin, high * margin
        else:
            margin = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
            low, high = low - margin if low < 0 or low - margin > 0 else 0.0, high + margin
        return cls(low, high, start, end, log, tuple(_log_ticks(low, high) if log else _linear_ticks(low, high)))

    def __call__(self, value: float) -> float:
        """Pixel of a number."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _linear_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """About `wanted` multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; powers alone where they are many, as many as fit where those are."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    multiples = (1, 2, 5) if last - first <= 4 else (1,)
    powers = range(first, last + 1, max(1, (last - first) // 8))
    return [t for k in powers for m in multiples if low <= (t := float(f"{m}e{k}")) <= high]


def tick_label(value: float) -> str:
    """A round number in few characters: 0.05, 20, 15k, 2M, 5e-5."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(factor, 1e4):
            return f"{value / factor:.6g}{letter}"
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


@dataclass(frozen=True)
class Label:
    """Where a label stands.

    Attributes:
        box: its rectangle in pixels.
        point: where its leader line meets the rectangle; None if it is so near that it needs none.
    """

    box: Box
    point: tuple[float, float] | None

    def text(self, words: str) -> str:
        """The `<text>` element."""
        return text(self.box[0], self.box[3] - 0.25 * EM, words)


def place_labels(
    names: Sequence[str], points: Sequence[tuple[float, float]], obstacles: Sequence[Box], field: Box
) -> list[Label]:
    """A place for the label of each point: the nearest one that covers no obstacle, no other label and no border.

    Where there is none, the one that covers least. Points are taken from left to right.
    """
    taken, places = list(obstacles), {}
    for i in sorted(range(len(names)), key=lambda i: points[i]):
        candidates = [_label(names[i], points[i], gap, side) for gap in _GAPS for side in _SIDES]
        places[i] = min(candidates, key=lambda label: _covered(label.box, taken, field))
        taken.append(places[i].box)
    return [places[i] for i in range(len(names))]


def _label(name: str, point: tuple[float, float], gap: float, side: tuple[int, int]) -> Label:
    wide, tall = text_width(name) + 4, 1.25 * EM
    dx, dy = side
    left = point[0] + (dx * gap if dx > 0 else dx * (gap + wide) if dx else -wide / 2)
    top = point[1] + (dy * gap if dy > 0 else dy * (gap + tall) if dy else -tall / 2)
    near = min(max(point[0], left), left + wide), min(max(point[1], top), top + tall)
    return Label((left, top, left + wide, top + tall), near if gap > _GAPS[0] else None)


def _covered(box: Box, taken: Sequence[Box], field: Box) -> float:
    """Pixels of a box that lie on others, and ten times those that lie outside of the field."""
    inside = overlap(box, field)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(overlap(box, other) for other in taken) + 10 * max(0.0, area - inside - 1e-6)


def overlap(a: Box, b: Box) -> float:
    """Area that two rectangles share, square pixels."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, tall)


def text_width(words: str) -> float:
    """Pixels that a text takes, a little more than most fonts need."""
    ems = {c: 0.36 for c in " .,:;|!'()[]ijlft"} | {c: 0.9 for c in "mwMW@%"}
    return EM * sum(ems.get(c, 1.05 if ord(c) > 0x2E7F else 0.72 if c.isupper() else 0.6) for c in words)


def shortened(words: str, most: int = 36) -> str:
    """A name on one line of at most `most` characters."""
    words = " ".join(words.split())
    return words if len(words) <= most else words[: most - 1].rstrip() + "…"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", turn: bool = False) -> str:
    """A line of text, escaped; turned, it runs upwards."""
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor != "start" else ""
    place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"' if turn else f'x="{x:.1f}" y="{y:.1f}"'
    return f"<text {place}{kind}{anchor}>{escape(words)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line of one of the classes of `STYLE`."""
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def document(width: int, height: int, title: str, body: Sequence[str]) -> str:
    """A whole SVG file, which a page can also hold as it is."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="da" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img">'
    )
    paper = f'<rect class="paper" width="{width}" height="{height}"/>'
    return (
        "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", paper, *body, "</svg>"]) + "\n"
    )
