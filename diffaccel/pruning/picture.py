"""A picture of a network and of what a plan leaves of it: bars as long as their cost, filled as far as they stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from diffaccel.pruning.costs.table import Costs, planned
from diffaccel.pruning.groups import DEPTH, WIDTH, Group
from diffaccel.pruning.plan import PruningPlan

MARGIN, LINE, BAR, LONGEST, INDENT, GAP = 24, 18, 11, 180, 14, 12  # pixels; BAR is a bar's height, LONGEST its length
INK, GREY, PALE, LOST = "#222222", "#777777", "#cccccc", "#c00020"
GREEN, BLUE, SKY, ORANGE, PURPLE = "#009e73", "#0072b2", "#56b4e9", "#e69f00", "#cc79a7"  # Okabe and Ito: for all eyes
PLACES = {  # by what stands in a group's name behind that of its row
    "channels": (GREEN, "channels inside ResNets, in norm groups"),
    "heads": (BLUE, "heads of attentions"),
    "attn.heads": (BLUE, "heads of attentions over image and text"),
    "attn1.heads": (BLUE, "heads of self-attentions"),
    "attn2.heads": (SKY, "heads of second attentions: to the text (in SD 3.5 to the image)"),
    "ff.neurons": (ORANGE, "neurons of feed-forward layers"),
    "neurons": (ORANGE, "neurons of feed-forward layers"),
    "ff_context.neurons": (PURPLE, "neurons of the text's feed-forward layers"),
}


@dataclass(frozen=True)
class _Bar:
    """A group of width: its place in its row ("attn1.heads"), its units and its cost, before and after."""

    place: str
    units: int
    kept: int
    cost: float
    left: float

    @property
    def number(self) -> str:
        return f"{self.kept}/{self.units}" if self.kept < self.units else str(self.units)


@dataclass(frozen=True)
class _Row:
    """A ResNet, an attention or a transformer block; `gone` is what to say of one that is removed whole."""

    name: str
    gone: str
    bars: list[_Bar]


@dataclass(frozen=True)
class _Panel:
    """Rows of a stage from the top down, and the left edges of their bars by place."""

    title: str
    rows: list[_Row]
    columns: Mapping[str, int]
    size: tuple[int, int]


def draw(model: nn.Module, plan: PruningPlan, costs: Costs) -> Image.Image:
    """The network with its blocks, every group of width a bar; a U-Net as a U, down on the left and up on the right.

    A bar's length is the cost of the group's units, its filled part what is kept of it; the numbers are units. Rows
    that are struck out are removed whole (of a ResNet the shortcut stays). What cannot be pruned has no bar:
    embeddings, first and last layers, shortcuts, layers that change the resolution.

    Args:
        model: the network before it is cut, on any device; only its shapes are looked at.
        plan: what is removed.
        costs: of all groups of the network, in any measure.

    Raises:
        ValueError: if the plan is for another network, or a group has no cost.
    """
    groups = plan.check(model).found
    if missing := [name for name in groups if name not in costs.kept]:
        raise ValueError(f"no cost for {missing[0]}; make the costs of all groups that find_groups(model) finds")
    stages = _stages(groups, plan, costs)
    rows = [row for stage in stages.values() for row in stage]
    scale = LONGEST / (max((bar.cost for row in rows for bar in row.bars), default=0.0) or 1.0)
    panels = {name: _panel(name, rows, costs, scale) for name, rows in stages.items()}
    left = planned(costs, list(groups.values()), plan.removed)
    head = _head(plan.model, costs, left, rows)
    spots = _spots(panels, depth=len(getattr(model, "down_blocks", ())))
    width = max(head.width, *(x + panels[name].size[0] for name, (x, _) in spots.items()))
    height = head.height + max(y + panels[name].size[1] for name, (_, y) in spots.items())
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), "white")
    sheet.paste(head, (MARGIN, MARGIN))
    for name, (x, y) in spots.items():
        corner = (MARGIN + x, MARGIN + head.height + y)
        _draw_panel(ImageDraw.Draw(sheet), panels[name], corner, scale, up=name.startswith("up_blocks"))
    return sheet


def amount(costs: Costs, value: float) -> str:
    """A cost with its unit, which the total decides, so that the costs of one network can be compared."""
    scale, unit = {
        "macs": (1e9, "GMACs") if costs.total >= 1e9 else (1e6, "million MACs"),
        "parameters": (1e6, "million parameters"),
        "latency": (1e-3, "ms"),
    }[costs.measure]
    return f"{value / scale:,.{1 if costs.total / scale >= 10 else 3}f} {unit}"


def stage_of(module: str) -> str:
    """`down_blocks.1`, `mid_block`, `up_blocks.0`, `transformer_blocks` or `single_transformer_blocks`."""
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if first in ("down_blocks", "up_blocks") else first


def _stages(groups: Mapping[str, Group], plan: PruningPlan, costs: Costs) -> dict[str, list[_Row]]:
    """Rows by stage, in the order in which they are called."""
    gone = {at: name for name in plan.removed if groups[name].kind in DEPTH for at in groups[name].modules}
    rows: dict[str, _Row] = {}
    for group in groups.values():
        if group.kind not in (*WIDTH, "block"):
            continue
        name = _row_of(group.modules[0])
        by = {gone[at] for at in gone if f"{name}.".startswith(f"{at}.")}
        told = "all but the shortcut removed" if by == {f"{name}.body"} else "removed"
        row = rows.setdefault(name, _Row(name, told if by else "", []))
        if group.kind in WIDTH:
            kept = group.units - len(plan.removed.get(group.name, ()))
            curve = np.maximum(costs.kept[group.name] - costs.kept[group.name][0], 0.0)  # latency has noise
            cost, left = float(curve[-1]), 0.0 if row.gone else float(min(curve[kept], curve[-1]))
            row.bars.append(_Bar(group.name.removeprefix(f"{name}."), group.units, kept, cost, left))
    stages: dict[str, list[_Row]] = {}
    for name in sorted(rows, key=_order):
        stages.setdefault(stage_of(name), []).append(rows[name])
    return stages


def _row_of(module: str) -> str:
    """The entry of a list that a module is in: `transformer_blocks.3` for `transformer_blocks.3.ff`."""
    parts = module.split(".")
    return ".".join(parts[: 1 + max(i for i, part in enumerate(parts) if part.isdigit())])


def _order(row: str) -> tuple[bool, list[int], bool, list[int]]:
    """Within a stage: ResNet 0, attention 0 with its blocks, ResNet 1, ...; what resamples comes last."""
    numbers = [int(part) for part in row.removeprefix(stage_of(row)).split(".") if part.isdigit()]
    return "samplers" in row, numbers[:1], "attentions" in row, numbers[1:]


def _label(row: str) -> str:
    """`attention 0 block 3`."""
    words = row.removeprefix(f"{stage_of(row)}.").replace("transformer_blocks", "blocks").split(".")
    words = ["blocks", *words] if len(words) == 1 else words
    return " ".join(word.removesuffix("s") for word in words)


def _panel(name: str, rows: list[_Row], costs: Costs, scale: float) -> _Panel:
    """Each place has a column; a bar that is alone in its row begins the row. On the way up the rows run upwards."""
    columns: dict[str, int] = {}
    end = start = INDENT + GAP + max(_wide(_label(row.name), 12) for row in rows)
    for several in (True, False):
        bars = [bar for row in rows for bar in row.bars if (len(row.bars) > 1) == several]
        for place in dict.fromkeys(bar.place for bar in bars):
            ends = [bar.cost * scale + _wide(bar.number, 11) for bar in bars if bar.place == place]
            end = max(end, columns.setdefault(place, end if several else start) + round(max(ends)) + 4 + GAP)
    for row in rows:
        if row.gone and row.bars:
            bar = row.bars[-1]
            end = max(end, columns[bar.place] + round(bar.cost * scale) + 4 + _wide(row.gone, 11))
    cost, left = (sum(getattr(bar, key) for row in rows for bar in row.bars) for key in ("cost", "left"))
    title = f"{name}: {amount(costs, cost)}, {left / cost:.0%} left" if cost else name
    ordered = rows[::-1] if name.startswith("up_blocks") else rows
    return _Panel(title, ordered, columns, (max(end, _wide(title, 14)), LINE * (len(rows) + 2)))


def _spots(panels: Mapping[str, _Panel], depth: int) -> dict[str, tuple[int, int]]:
    """Corners: each stage of a U-Net beside its mirror image, the middle below; lists of blocks side by side."""
    width = max(panel.size[0] for panel in panels.values()) + 2 * MARGIN
    if not depth:
        lists = [name for name in ("transformer_blocks", "single_transformer_blocks") if name in panels]
        return {name: (i * width, 0) for i, name in enumerate(lists)}
    spots, y = {}, 0
    for i in range(depth):
        pair = [name for name in (f"down_blocks.{i}", f"up_blocks.{depth - 1 - i}") if name in panels]
        spots |= {name: (0 if name.startswith("down") else width, y) for name in pair}
        y += max((panels[name].size[1] for name in pair), default=0)
    return spots | ({"mid_block": (width // 2, y)} if "mid_block" in panels else {})


def _head(model: str, costs: Costs, left: float, rows: Sequence[_Row]) -> Image.Image:
    """Name, costs before and after with a bar, and what lengths and colours mean."""
    places = {bar.place for row in rows for bar in row.bars}
    measure = "time" if costs.measure == "latency" else costs.measure.replace("macs", "MACs")
    image = Image.new("RGB", (700, 9 * LINE + LINE * len(places)), "white")
    pen = ImageDraw.Draw(image)
    pen.text((0, 0), model, fill=INK, font=_font(20))
    change = f"{amount(costs, costs.total)} before, {amount(costs, left)} after: {left / costs.total:.1%}"
    pen.text((0, 28), change, fill=INK, font=_font(14))
    _draw_bar(pen, (0, 50), 400, 400 * left / costs.total, INK)
    y = 72
    pen.text((0, y), f"Length of a bar: its {measure}; filled: what is kept; number: units.", fill=INK, font=_font(12))
    y += 4
    known = {_place(place) for place in places}
    for text, colour in {PLACES[place][1]: PLACES[place][0] for place in PLACES if place in known}.items():
        y += LINE
        _draw_bar(pen, (0, y), 40, 26, colour)
        pen.text((50, y + BAR / 2), text, fill=INK, font=_font(12), anchor="lm")
    return image.crop((0, 0, image.width, y + 2 * LINE))


def _draw_panel(pen: ImageDraw.ImageDraw, panel: _Panel, corner: tuple[int, int], scale: float, up: bool) -> None:
    """Title, an arrow in the direction of the network, rows."""
    x, y = corner
    pen.text((x, y), panel.title, fill=INK, font=_font(14))
    top, bottom = y + LINE + 6, y + LINE * (len(panel.rows) + 1)
    tip, base = (top - 3, top + 5) if up else (bottom + 3, bottom - 5)
    pen.line((x + 4, top, x + 4, bottom), fill=GREY)
    pen.polygon([(x + 4, tip), (x, base), (x + 8, base)], fill=GREY)
    for i, row in enumerate(panel.rows):
        y, middle = top + LINE * i, top + LINE * i + BAR // 2
        pen.text((x + INDENT, middle), _label(row.name), fill=INK, font=_font(12), anchor="lm")
        end = start = x + min(panel.columns.values(), default=LONGEST)
        for bar in row.bars:
            left = x + panel.columns[bar.place]
            end = left + round(bar.cost * scale) + 4
            _draw_bar(pen, (left, y), bar.cost * scale, bar.left * scale, PLACES[_place(bar.place)][0])
            if not row.gone:
                colour = GREY if bar.kept == bar.units else INK
                pen.text((end, middle), bar.number, fill=colour, font=_font(11), anchor="lm")
        if row.gone:
            pen.line((start, middle, end - 4, middle), fill=LOST)
            pen.text((end, middle), row.gone, fill=LOST, font=_font(11), anchor="lm")


def _place(place: str) -> str:
    """Entry of `PLACES`: that of the kind for a place of no colour of its own (GLIGEN's `fuser.attn.heads`)."""
    return place if place in PLACES else place.rpartition(".")[2]


def _draw_bar(pen: ImageDraw.ImageDraw, corner: tuple[int, int], length: float, filled: float, colour: str) -> None:
    """An outline as long as the cost, and in it what is left, at least a pixel of each."""
    x, y = corner
    pen.rectangle((x, y, x + max(1, round(length)), y + BAR), outline=colour if filled else PALE, fill="white")
    if filled:
        pen.rectangle((x, y, x + max(1, round(filled)), y + BAR), fill=colour)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _wide(text: str, size: int) -> int:
    """Width in pixels."""
    return round(_font(size).getlength(text))
