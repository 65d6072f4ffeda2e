"""The tables and the picture of `sparse_edit.py`, from its JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffaccel.pictures import save_text

GOALS = {0.01: 8.0, 0.05: 6.0, 0.15: 3.0, 0.35: 1.7}
PLACES = {"ring": "mask + 5 px", "mask": "mask"}
NORMS = {"cached": ":", "last": "-", "incremental": "--"}


def write_report(folder: Path) -> None:
    """`sparse_edit.md` and `sparse_edit.png`, of all networks in the folder."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("sparse_edit_*.json"))]
    text = "# Sparse edits on networks of full size, random weights\n\n" + "\n".join(map(section, found))
    save_text(text, folder / "sparse_edit.md")
    draw(found, folder / "sparse_edit.png")


def section(found: dict[str, Any]) -> str:
    """One network."""
    defaults = ", ".join(f"{name} {value}" for name, value in found["defaults"].items())
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    parts = [
        f"## {found['title']}, random weights ({found['init']})\n",
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['macs'] / 1e9:.1f} GMACs, float32. "
        f"{packages}; {found['processor']}. Defaults: {defaults}.\n",
        "Error: relative RMSE against the dense network on the edited input, in per cent, in the mask + 5 px / in the "
        "mask / outside; mean of the edits (DDPM-256 two, SD 1.5 one). Chosen: the fewest MACs with at most SIGE's "
        "error there.\n",
        table(["edit", "no change", "SIGE's rule", "at most SIGE's in", "chosen", "its error", "MACs"], errors(found)),
    ]
    for threads, rows in found.get("times", {}).items():
        header = ["edit", "at most SIGE's in", "batch", "goal", "CPU time", "wall", "minima, CPU", "minima, wall"]
        header += ["dense s", "sparse s", "record s"]
        parts += [f"Forward, {threads} thread(s): dense / sparse, medians over rounds by turns.\n"]
        parts += [table(header, [speeds(row) for row in rows])]
    if "break_even" in found:
        cells = [f"{row['share']:.0%}: {row['cpu_ratio']:.2f}" for row in found["break_even"]]
        parts += [f"Without a margin and a limit, CPU time of dense / sparse, one thread: {', '.join(cells)}.\n"]
    header = ["kept as", "norm", "MiB a call", "margin", "mask + 5 px", "mask"]
    parts += [f"Memory of one recorded call, and the error at a 5 % edit.\n\n{table(header, memory(found))}"]
    return "\n".join(parts)


def errors(found: dict[str, Any]) -> list[list[str]]:
    """Rows of the error table."""
    rows = []
    for edit in found["edits"]:
        sige = edit["sige"]
        nothing = {name: sige[f"nothing_{name}"] for name in ("ring", "mask", "outside")}
        for where, choice in edit["chosen"].items():
            cells = ["none", "", ""]
            if choice is not None:
                setting = f"margin {choice['margin']}, {choice['norm']}, dense_below {choice['dense_below']}"
                cells = [setting, _errors(choice), f"1 / {found['macs'] / choice['macs']:.1f}"]
            rows.append([f"{edit['share']:.0%}", _errors(nothing), _errors(sige), PLACES[where], *cells])
    return rows


def speeds(row: dict[str, Any]) -> list[str]:
    """A row of the table of times."""
    names = ("cpu_ratio", "wall_ratio", "cpu_ratio_of_minima", "wall_ratio_of_minima")
    ratios = [f"{row[name]:.1f}" for name in names]
    seconds = [f"{row[f'wall_{name}']:.2f}" for name in ("dense", "sparse", "record")]
    return [
        f"{row['share']:.0%}",
        PLACES[row["where"]],
        str(row["batch"]),
        f"{GOALS[row['share']]:g}",
        *ratios,
        *seconds,
    ]


def memory(found: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of memory."""
    return [
        [row["dtype"], row["norm"], f"{row['bytes'] / 2**20:.0f}", str(row["margin"]), *map(_percent, _pair(row))]
        for row in found["memory"]
    ]


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Error against margin with SIGE's line, a column for each edit; and the speed-ups beside the goals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(found), len(GOALS) + 1, figsize=(19, 3.4 * len(found)), squeeze=False)
    for line, network in zip(axes, found, strict=True):
        for axis, edit in zip(line, network["edits"], strict=False):
            curves(axis, edit, network["edits"][0]["curve"])
            axis.set_title(f"{network['title']} ({network['init']}), {edit['share']:.0%} edited", fontsize=9)
        bars(line[-1], network)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(axis: Any, edit: dict[str, Any], like: list[dict[str, Any]]) -> None:
    """One edit: a line for each norm and level from which on it is dense."""
    levels = sorted({row["dense_below"] for row in like})
    for norm, style in NORMS.items():
        for k, below in enumerate(levels):
            rows = [row for row in edit["curve"] if (row["norm"], row["dense_below"]) == (norm, below)]
            points = [row["margin"] for row in rows], [100 * row["ring"] for row in rows]
            axis.plot(*points, style, marker=".", color=f"C{k}", label=f"{norm}, dense_below {below}")
    axis.axhline(100 * edit["sige"]["ring"], color="black", linewidth=1.5, label="SIGE's rule")
    axis.set_yscale("log")
    axis.set_xlabel("margin, pixels of the network's input", fontsize=8)
    axis.set_ylabel("relative RMSE in the mask + 5 px, %", fontsize=8)


def bars(axis: Any, network: dict[str, Any]) -> None:
    """Speed-ups of the settings that are at least as exact as SIGE's rule, by threads; the goals as lines."""
    times = network.get("times", {})
    for k, (threads, rows) in enumerate(times.items()):
        for where, shade in (("ring", 1.0), ("mask", 0.5)):
            chosen = [row for row in rows if (row["where"], row["batch"]) == (where, max(row["batch"] for row in rows))]
            at = [list(GOALS).index(row["share"]) + 0.4 * k + 0.2 * (where == "mask") for row in chosen]
            label = f"{threads} thread(s), by {PLACES[where]}"
            axis.bar(at, [row["wall_ratio"] for row in chosen], 0.18, color=f"C{k}", alpha=shade, label=label)
    for i, goal in enumerate(GOALS.values()):
        axis.plot([i - 0.1, i + 0.7], [goal, goal], color="black", label=None if i else "goal")
    axis.set_xticks([i + 0.3 for i in range(len(GOALS))], [f"{share:.0%}" for share in GOALS])
    axis.set_title("forward, dense / sparse (wall), at SIGE's error", fontsize=9)
    axis.legend(fontsize=7)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
    return lines + "\n"


def _pair(row: dict[str, Any]) -> tuple[float, float]:
    return row["ring"], row["mask"]


def _errors(row: dict[str, Any]) -> str:
    return " / ".join(_percent(row[name]) for name in ("ring", "mask", "outside"))


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if value < 0.1 else f"{100 * value:.1f}"
