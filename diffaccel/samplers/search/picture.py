"""Pictures of recipes: noise levels, what the network is told, weights, and how the search went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffaccel.samplers.grid import time_grid
from diffaccel.samplers.schedule import NoiseSchedule
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.search.recipe import Entry, Recipe

KNOWN = {"logsnr": "#9ecae1", "karras": "#fdae6b", "beta": "#a1d99b"}  # drawn beside what was found
FOUND, GREY = "#c0392b", "#888888"
MOST_NOISE = 1e3  # sigma / alpha that stands for pure noise, which has none
STAGES = {"least squares": "#1f77b4", "evolution": "#2ca02c", "descent": FOUND}


def draw(recipe: Recipe | Entry, path: str | Path, target: Any = None) -> Path:
    """Draw a recipe as a PNG, a line for each entry.

    From left to right: noise at each call; what the network is told there; the weights of the table, in
    y = x / alpha; and, for methods that leave something to see, how it was found.

    Args:
        recipe: a recipe or one of its entries.
        path: of the PNG.
        target: the pipeline, or its scheduler's config. A recipe does not hold the noise schedule; with it, log-SNR,
            Karras and beta with as many calls are drawn too, and how far off the exact time the network is told.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the picture of a recipe needs matplotlib; pip install matplotlib") from None
    entries = recipe.entries if isinstance(recipe, Recipe) else (recipe,)
    schedule = None if target is None else _schedule(target)
    wide = max(2.8, 0.42 * max(len(entry.rows) for entry in entries) + 1.4)
    widths = [3.6, 3.0, wide, *([3.4] if any(_search_of(entry) for entry in entries) else [])]
    figure = Figure(figsize=(sum(widths) + 0.6, 3.3 * len(entries)), layout="constrained")
    lines = figure.subfigures(len(entries), 1, squeeze=False, hspace=0.04)[:, 0]
    for line, entry in zip(lines, entries, strict=True):
        line.suptitle(_title(entry), fontsize=11, fontweight="bold", x=0.01, ha="left")
        panels = line.subplots(1, len(widths), width_ratios=widths)
        _noise(panels[0], entry, schedule)
        _told(panels[1], entry, schedule)
        _weights(panels[2], entry)
        if len(widths) > 3:
            (_search_of(entry) or _nothing)(panels[3], entry)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    partial.replace(path)
    return path


def _schedule(target: Any) -> NoiseSchedule:
    return SolverScheduler.from_config(target.scheduler.config if hasattr(target, "scheduler") else target).schedule


def _title(entry: Entry) -> str:
    return f"{entry.method}, {entry.steps} calls, guidance {entry.guidance_scale:g}"


def _noise(axes: Any, entry: Entry, schedule: NoiseSchedule | None) -> None:
    """Sigma / alpha at each call, and at the end where that is not 0."""
    for name, colour in KNOWN.items() if schedule else ():
        assert schedule is not None
        grid = time_grid(schedule, len(entry.rows), name, final="zero" if entry.end is None else "sigma_min")
        _levels(axes, grid.lambdas, marker="o", markersize=3, color=colour, label=name)
    end = np.inf if entry.end is None else entry.end
    _levels(axes, (*entry.lambdas, end), marker="o", color=FOUND, linewidth=2, label="recipe")
    axes.set(yscale="log", xlabel="network call" + ("" if entry.end is None else ", and the end"), title="noise")
    axes.set_ylabel("sigma / alpha")
    _whole(axes, len(entry.rows) + (entry.end is not None))
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)


def _levels(axes: Any, lambdas: tuple[float, ...], **style: Any) -> None:
    levels = np.exp(-np.array([lam for lam in lambdas if lam < np.inf]))
    axes.plot(np.arange(1, len(levels) + 1), np.minimum(levels, MOST_NOISE), **style)


def _told(axes: Any, entry: Entry, schedule: NoiseSchedule | None) -> None:
    """How far what the network is told is off the exact time of its noise; without a schedule, the times."""
    told, calls = np.array(entry.timesteps), np.arange(1, len(entry.rows) + 1)
    if schedule is None:
        axes.plot(calls, told, "o-", color=FOUND)
        axes.set(title="what the network is told", ylabel="timestep")
    else:
        off = told - schedule.time_at(np.array(entry.lambdas))
        off[np.abs(off) < 1e-6 * schedule.count] = 0.0  # rounding
        axes.bar(calls, off, color=FOUND, width=0.6)
        for call, value, time in zip(calls, off, told, strict=True):
            axes.annotate(
                f"{time:.0f}" if schedule.count > 1 and told.max() > 10 else f"{time:.3g}",
                (call, value),
                xytext=(0, 3 if value >= 0 else -3),
                textcoords="offset points",
                ha="center",
                va="bottom" if value >= 0 else "top",
                fontsize=8,
                color=GREY,
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.margins(y=0.15)
        axes.set(title="told time - exact time (grey: told)", ylabel="timesteps")
        if not off.any():
            axes.set(ylim=(-1, 1), yticks=[0], title="told: the exact times (grey)")
    axes.set_xlabel("network call")
    _whole(axes, len(calls))
    axes.grid(alpha=0.3, axis="y")


def _weights(axes: Any, entry: Entry) -> None:
    """The table: a line for each step, weights of the sample and of the predictions, the newest first."""
    n = len(entry.rows)
    table = np.full((n, n + 1), np.nan)
    for i, row in enumerate(entry.rows):
        table[i, : len(row)] = row
    most = min(2.0, max(1.0, float(np.nanmax(np.abs(table)))))
    axes.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    size = float(np.clip(60 / n, 4, 9))
    for (i, j), weight in np.ndenumerate(table):
        if np.isfinite(weight):
            dark = abs(weight) > 0.6 * most
            axes.text(
                j,
                i,
                f"{weight:.2f}".replace("-0.00", "0.00"),
                ha="center",
                va="center",
                fontsize=size,
                color="w" if dark else "k",
            )
    names = ["sample", "x0", *(f"-{k}" for k in range(1, n))]
    axes.set_xticks(range(n + 1), names, fontsize=8)
    axes.set_yticks(range(n), [str(i + 1) for i in range(n)])
    axes.set(title="weights of each step", xlabel="newest prediction first", ylabel="step")


def _search_of(entry: Entry) -> Callable[[Any, Entry], None] | None:
    """What draws how this entry was found, if that was kept."""
    needs = {
        "dc": ("ratios", _ratios),
        "auto": ("history", _stages),
        "ays": ("history", _passes),
        "gits": ("errors", _coefficients),
        "usf": ("history", _evolution),
        "autodiffusion": ("skips", _costs),
    }
    note, panel = needs.get(entry.method, ("", _nothing))
    return panel if entry.notes.get(note) else None


def _nothing(axes: Any, entry: Entry) -> None:
    axes.set_axis_off()


def _ratios(axes: Any, entry: Entry) -> None:
    ratios = entry.notes["ratios"]
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.plot(range(1, len(ratios) + 1), ratios, "o-", color=FOUND)
    axes.set(title="compensation ratios (1: none)", xlabel="network call", ylabel="ratio")
    _whole(axes, len(ratios))
    axes.grid(alpha=0.3)


def _stages(axes: Any, entry: Entry) -> None:
    """Error on the pairs kept aside; the descent is looked at every tenth iteration."""
    history = [(str(stage), float(error)) for stage, error in entry.notes["history"]]
    axes.plot(range(1, len(history) + 1), [error for _, error in history], color=GREY, linewidth=0.8)
    for stage in dict.fromkeys(stage for stage, _ in history):
        points = [(i, error) for i, (name, error) in enumerate(history, 1) if name == stage]
        axes.plot(*zip(*points, strict=True), "o", color=STAGES.get(stage, GREY), markersize=4, label=stage)
    axes.set(
        yscale="log", title="how it was found", xlabel="times it was judged", ylabel="squared error, pairs kept aside"
    )
    axes.tick_params(which="minor", labelsize=8)
    _whole(axes, len(history))
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3, which="both")


def _passes(axes: Any, entry: Entry) -> None:
    """Schedules of the last rung, from the start (light) to the last pass, and the one that was taken."""
    history = entry.notes["history"]
    chosen = history[entry.notes["chosen"]]
    shown = [one for one in history if one["intervals"] == chosen["intervals"]]
    for k, one in enumerate(shown):
        axes.plot(one["sigmas"], color=str(0.85 - 0.6 * k / max(1, len(shown) - 1)), linewidth=0.8)
    axes.plot(chosen["sigmas"], "o-", color=FOUND, label=f"taken: pass {chosen['pass']} of {shown[-1]['pass']}")
    axes.set(yscale="log", title="the schedule, pass by pass", xlabel="level", ylabel="sigma / alpha")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)


def _coefficients(axes: Any, entry: Entry) -> None:
    found = sorted((float(name), error) for name, error in entry.notes["errors"].items())
    axes.plot(*zip(*found, strict=True), "o-", color=GREY)
    taken = entry.notes["coeff"]
    axes.plot(taken, dict(found)[taken], "o", color=FOUND, label=f"taken: {taken:g}")
    axes.set(yscale="log", title="error of each grid", xlabel="coeff", ylabel="squared error, fitted pairs")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)


def _evolution(axes: Any, entry: Entry) -> None:
    spent, errors = zip(*((float(one[0]), float(one[1])) for one in entry.notes["history"]), strict=True)
    axes.step(spent, errors, where="post", color=FOUND)
    axes.set(yscale="log", title="best so far", xlabel="runs of all pairs", ylabel="squared error, fitted pairs")
    axes.grid(alpha=0.3, which="both")


def _costs(axes: Any, entry: Entry) -> None:
    """What each call costs of a whole one, by the layers that it leaves out."""
    shares, skips = entry.notes.get("shares", {}), entry.notes["skips"]
    costs = [1 - sum(shares.get(name, 0.0) for name in skipped) for skipped in skips]
    calls = range(1, len(costs) + 1)
    axes.bar(calls, costs, color=FOUND, width=0.6)
    for call, cost, skipped in zip(calls, costs, skips, strict=True):
        axes.text(call, cost, f"-{len(skipped)}" if skipped else "", ha="center", va="bottom", fontsize=8)
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(title="cost of each call", xlabel="network call (number: layers left out)", ylabel="share of a whole call")
    axes.set_ylim(0, 1.15)
    _whole(axes, len(costs))


def _whole(axes: Any, count: int) -> None:
    """Whole numbers on the x axis, few enough to read."""
    axes.set_xticks(range(1, count + 1, max(1, -(-count // 10))))
