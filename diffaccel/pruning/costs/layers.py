"""Where a network's parameters and multiply-accumulates are, layer by layer."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from torch import nn

from diffaccel import cost
from diffaccel.meta import meta_copy, to_meta

HEADER = ("name", "class", "parameters", "MACs", "share")


@dataclass(frozen=True)
class Layer:
    """One module without what is in the modules inside it, so that a table of them adds up.

    Attributes:
        name: in the network; "" is the network itself.
        kind: class.
        parameters: shared ones count where they come first.
        macs: multiply-accumulates; of an attention softmax(Q K^T) V, its projections have their own rows.
        share: of all multiply-accumulates, 0 to 1.
    """

    name: str
    kind: str
    parameters: int
    macs: int
    share: float


def layer_table(model: nn.Module, inputs: Mapping[str, Any]) -> list[Layer]:
    """Every module with parameters or multiply-accumulates of its own in `model(**inputs)`, in the network's order."""
    shapes = meta_copy(model)
    macs = _own_macs(shapes, cost.macs_by_module(shapes, **to_meta(dict(inputs))))
    total = sum(macs.values())
    rows, seen = [], set()
    for name, module in shapes.named_modules():
        own = {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in seen}
        seen |= own.keys()
        count = macs.get(name, 0)
        if own or count:
            share = count / total if total else 0.0
            rows.append(Layer(name, type(module).__name__, sum(own.values()), count, share))
    return rows


def _own_macs(model: nn.Module, macs: Mapping[str, int]) -> dict[str, int]:
    own = dict(macs)
    for name in macs:
        above = name
        while above:  # containers that are never called are not in `macs`
            above = above.rpartition(".")[0]
            if above in macs:
                own[above] -= macs[name]
                break
    # A module may be called from outside of the one it is in (DiT's first embedder, for the last norm). Then it has
    # more than its parent saw, and what the parent has too little was counted for the caller.
    own = {name: max(count, 0) for name, count in own.items()}
    own[""] = macs[""] - sum(count for name, count in own.items() if name)
    return own


def layer_markdown(rows: Sequence[Layer]) -> str:
    """Markdown table with a last row of sums; parameters in millions, MACs in 10^9."""
    lines = ["| name | class | parameters (M) | GMACs | share |", "|---|---|---:|---:|---:|"]
    sums = (sum(row.parameters for row in rows), sum(row.macs for row in rows), sum(row.share for row in rows))
    for row in [*rows, Layer("total", "", *sums)]:
        cells = (f"{row.parameters / 1e6:.3f}", f"{row.macs / 1e9:.3f}", f"{row.share:.1%}")
        lines.append(f"| {row.name or '(network)'} | {row.kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def layer_csv(rows: Sequence[Layer]) -> str:
    """CSV with a header; plain numbers, share from 0 to 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()
