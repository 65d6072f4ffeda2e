"""The report of a pruning: what went, what it costs before and after, how to open it. Markdown, a picture, CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diffaccel.pictures import save_picture, save_text
from diffaccel.pruning.costs.layers import Layer, layer_csv
from diffaccel.pruning.groups import DEPTH, Group
from diffaccel.pruning.picture import stage_of
from diffaccel.pruning.plan import PruningPlan

REPORT, PICTURE, LAYERS = "pruning_report.md", "pruning.png", "pruning_layers.csv"
HEADINGS = {  # what the units of a kind are called
    "heads": "attention heads",
    "neurons": "neurons",
    "channels": "norm groups of channels",
    "block": "transformer blocks",
    "layer": "layers (with the partner on the way up)",
    "transformer": "transformers",
    "resnet": "ResNets (all but the shortcut)",
    "mid_block": "middle",
}
STAGES = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")
SHARES = ("target", "planned")  # facts that are shares of the cost


@dataclass(frozen=True)
class Loss:
    """What a stage lost of one kind of units.

    Attributes:
        stage: `down_blocks.1`, `mid_block`, `transformer_blocks`, ...
        kind: see `Group`.
        removed: units that are gone.
        units: units that there were.
    """

    stage: str
    kind: str
    removed: int
    units: int


@dataclass(frozen=True)
class Report:
    """What a report says, in plain values; costs are of one call, as (before, after).

    Attributes:
        source: the checkpoint, as the user named it.
        model: class of the network in Diffusers.
        facts: of the plan: criterion, budget, target, calibration, ...
        losses: see `losses`.
        macs: multiply-accumulates, attention counted.
        parameters: of the network.
        size: bytes of its weights.
        folder: where the result is; "" after a dry run, and what follows is not known then.
        component: name of the network in the pipeline; "" for a network alone.
        variant: of the names of the weights' files ("fp16"); "" for none.
        dtype: type the weights are stored in, such as "float16".
        stock: whether the folder opens without diffaccel.
        reload: relative difference of outputs between the network in memory and the one read from the folder.
        mask: the same between the cut network and the original with a mask; None if that was not compared.
        latency: median seconds; None if it was not measured.
        where: what the latency was measured on and with: device, type, inputs.
        memory: most memory that the pruning took, in bytes, by place ("main memory", ...).
    """

    source: str
    model: str
    facts: Mapping[str, Any]
    losses: Sequence[Loss]
    macs: tuple[float, float]
    parameters: tuple[int, int]
    size: tuple[int, int]
    folder: str = ""
    component: str = ""
    variant: str = ""
    dtype: str = "float32"
    stock: bool = True
    reload: float | None = None
    mask: float | None = None
    latency: tuple[float, float] | None = None
    where: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)


def losses(groups: Mapping[str, Group], plan: PruningPlan) -> list[Loss]:
    """What each stage loses, in the order of the network, of those kinds of which the network loses anything.

    Heads, neurons and channels count as removed inside of blocks that go, too. Blocks count once: not those inside of
    others. A layer of a U-Net counts in its stage on the way down.

    Args:
        groups: `find_groups(model).found`.
        plan: for the same network.
    """
    gone = [groups[name] for name in plan.removed if groups[name].kind in DEPTH]
    counts: dict[tuple[str, str], list[int]] = {}
    for group in groups.values():
        removed = len(plan.removed.get(group.name, ()))
        if any(outer.contains(group) for outer in gone):
            removed = 0 if group.kind in DEPTH else group.units
        count = counts.setdefault((stage_of(group.modules[0]), group.kind), [0, 0])
        count[0] += removed
        count[1] += group.units
    lost = {kind for (_, kind), (removed, _) in counts.items() if removed}
    rows = [Loss(stage, kind, *count) for (stage, kind), count in counts.items() if kind in lost]
    return sorted(rows, key=lambda row: STAGES.index(row.stage.split(".")[0]))


def markdown(report: Report) -> str:
    """The report as a page of Markdown, which shows `pruning.png` beside it; after a dry run without it."""
    title = f"# {report.model} of {_cell(report.source)}, pruned" + ("" if report.folder else " (dry run)")
    facts = "\n".join(
        f"- {_cell(name.replace('_', ' '))}: {_fact(name, value)}" for name, value in report.facts.items()
    )
    picture = [f"![the network: what is kept of every block]({PICTURE})"] if report.folder else []
    parts = [
        title,
        _costs(report),
        *picture,
        f"## What was removed\n\n{_losses(report.losses)}",
        f"## How it was chosen\n\n{facts}",
    ]
    if report.folder:
        parts += [f"## How to open it\n\n{_opening(report)}", f"## Checks\n\n{_checks(report)}"]
        parts.append(f"Costs of the original, layer by layer: `{LAYERS}`.")
    else:
        opens = "stock Diffusers" if report.stock else "Diffusers once diffaccel is imported"
        parts.append(f"Nothing was written. Written, the folder would open in {opens}.")
    return "\n\n".join(parts) + "\n"


def write_report(folder: str | Path, report: Report, picture: Image.Image, layers: Sequence[Layer]) -> list[Path]:
    """Write `pruning_report.md`, `pruning.png` and `pruning_layers.csv` into `folder`; their paths.

    Args:
        folder: it must exist.
        report: the facts.
        picture: `draw(...)` of the plan.
        layers: `layer_table(...)` of the network before it was cut.
    """
    files = [Path(folder) / name for name in (REPORT, PICTURE, LAYERS)]
    save_text(markdown(report), files[0])
    save_picture(picture, files[1])
    save_text(layer_csv(layers), files[2])
    return files


def _costs(report: Report) -> str:
    rows = [
        ("multiply-accumulates (MACs)", *_change(report.macs, ((1e9, "G"), (1e6, "M")))),
        ("parameters", *_change(report.parameters, ((1e9, "G"), (1e6, "M")))),
        ("weights", *_change(report.size, ((1e9, "GB"), (1e6, "MB")))),
    ]
    if report.latency:
        rows.append(("time of a call", *_change(report.latency, ((1.0, "s"), (1e-3, "ms")))))
    lines = [_table(("one call of the network", "before", "after", "after / before"), rows)]
    if report.latency:
        factor = report.latency[0] / report.latency[1]
        lines.append(f"{factor:.2f} times as fast. Measured with: {_cell(report.where)}.")
    if report.memory:
        memory = ", ".join(f"{_amount(size, ((1e9, 'GB'), (1e6, 'MB')))} of {at}" for at, size in report.memory.items())
        lines.append(f"The pruning took at most {memory}.")
    return "\n\n".join(lines)


def _change(values: tuple[float, float], units: Sequence[tuple[float, str]]) -> tuple[str, str, str]:
    """Before and after in the same unit, and the ratio."""
    before, after = values
    chosen = [unit for unit in units if before >= unit[0]][:1] or units[-1:]
    return _amount(before, chosen), _amount(after, chosen), f"{after / before:.1%}"


def _amount(value: float, units: Sequence[tuple[float, str]]) -> str:
    scale, unit = next((unit for unit in units if value >= unit[0]), units[-1])
    shown = value / scale
    return f"{shown:,.{1 if shown >= 100 else 2 if shown >= 10 else 3}f} {unit}"


def _losses(rows: Sequence[Loss]) -> str:
    """A row for every stage, a column for every kind, and the sums."""
    kinds = [kind for kind in HEADINGS if any(row.kind == kind for row in rows)]
    cells = {(row.stage, row.kind): (row.removed, row.units) for row in rows}
    stages = list(dict.fromkeys(row.stage for row in rows))
    for kind in kinds:
        own = [row for row in rows if row.kind == kind]
        cells["all", kind] = sum(row.removed for row in own), sum(row.units for row in own)
    table = [
        (stage, *(_of(*cells[stage, kind]) if (stage, kind) in cells else "" for kind in kinds))
        for stage in (*stages, "all")
    ]
    return _table(("removed", *(HEADINGS[kind] for kind in kinds)), table)


def _of(removed: int, units: int) -> str:
    return f"{removed} of {units} ({removed / units:.0%})"


def _opening(report: Report) -> str:
    options = f', variant="{report.variant}"' if report.variant else ""
    half = report.dtype != "float32"  # parts of a pipeline would open in different types, and the call fail
    options += f", dtype=torch.{report.dtype}" if half else ""
    call = f".from_pretrained({json.dumps(report.folder, ensure_ascii=False)}{options})"
    lines = [] if report.stock else ["import diffaccel  # knows the shapes of pruned networks"]
    lines += ["import torch"] if half else []
    if report.component:
        lines += ["from diffusers import DiffusionPipeline", "", f"pipe = DiffusionPipeline{call}"]
    elif report.stock:
        lines += [f"from diffusers import {report.model}", "", f"model = {report.model}{call}"]
    else:
        lines += ["", f"model = diffaccel.Pruned{report.model}{call}"]
    why = "Stock Diffusers opens it" if report.stock else "No stock config can say its shapes: import diffaccel first"
    return f"{why}.\n\n```python\n" + "\n".join(lines) + "\n```"


def _checks(report: Report) -> str:
    told = []
    if report.reload is not None:
        told.append(
            f"- Read again from the folder: outputs differ by {report.reload:.1e} from those in memory (relative)."
        )
    masked = "was not compared with it" if report.mask is None else f"outputs differ by {report.mask:.1e} (relative)"
    return "\n".join([*told, f"- Cut network against the original with a mask: {masked}."])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _fact(name: str, value: Any) -> str:
    if name in SHARES:
        return f"{value:.1%} of the cost"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else _cell(value)


def _cell(value: Any) -> str:
    """Text of a table's cell: on one line, without what Markdown would read as something else."""
    text = " ".join(str(value).split())
    return "".join(f"\\{sign}" if sign in "\\`*_|<>[]#~" else sign for sign in text)
