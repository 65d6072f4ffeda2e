"""Tables and plot of `solvers.py`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from solver_results import geometric_mean

import diffaccel
from diffaccel.eval import paired_interval
from diffaccel.pictures import save_text

SHARE = 0.01  # pairs whose reference is less exact than this share of the smallest median error are dropped


def write_report(found: Mapping[str, Any], args: Mapping[str, Any], output: Path) -> None:
    """Write solvers_<model>.md, .json and .png to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    name = f"solvers_{Path(args['model']).name}"
    scales = list(found["held_out"])
    parts = [_head(found, args), "## What to pick\n"]
    for scale in scales:
        parts.append(f"### Guidance scale {scale:g}\n")
        parts.append(_held_out(found, scale))
    parts += [
        "## Every solver\n",
        _by_solver(found["screened"]),
        "## Every schedule\n",
        _by_schedule(found["screened"]),
    ]
    parts += ["## Solvers with noise\n", _noisy(found["noisy"])]
    save_text("\n".join(parts), output / f"{name}.md")
    rows = {str(scale): [_summary(r, _kept(found, scale)) for r in found["held_out"][scale]] for scale in scales}
    screened = [{"label": r.label, "calls": r.calls, "error": r.error()} for r in found["screened"]]
    save_text(json.dumps({"held_out": rows, "screened": screened}, indent=1), output / f"{name}.json")
    _plot(found).savefig(output / f"{name}.png", dpi=150)


def _head(found: Mapping[str, Any], args: Mapping[str, Any]) -> str:
    return (
        f"# Every solver, every schedule: `{args['model']}`\n\n"
        f"- Weights and noise schedule `{found['weights']}` (SHA-256); diffaccel {diffaccel.__version__}, torch "
        f"{torch.__version__}, diffusers {diffusers.__version__}"
        f"{'; network through torch.compile' if args['compile'] else ''}.\n"
        f"- Screening, to choose: 8 prompts x {args['screening_seeds']} seeds at guidance scale "
        f"{args['guidance_scale'][0]:g}, geometric mean of the latent MSE. Scoring: {args['prompts']} other prompts x "
        f"{args['seeds']} seeds, medians.\n"
        f"- Reference: DPM++ 2M on log-SNR with 100 and 200 steps; pairs on which these differ by more than "
        f"{SHARE:.0%} of the smallest median error are dropped.\n"
        f"- `{args['clip']}` distance: 1 - cosine to the reference's picture. Variance: that of the latents over the "
        "reference's, picture by picture.\n"
        "- Ratio: median over pairs of the latent MSE over that of Diffusers' best in the same table, with a 95 % "
        "interval by bootstrap over prompts.\n"
    )


def _kept(found: Mapping[str, Any], scale: float) -> np.ndarray:
    smallest = min(float(np.median(r.scores["mse"])) for r in found["held_out"][scale])
    return np.asarray(found["errors"][scale]) <= SHARE * smallest


def _summary(row: Any, kept: np.ndarray) -> dict[str, Any]:
    values = {k: float(np.median(np.asarray(v)[kept])) for k, v in row.scores.items() if v and k != "mse_against"}
    return {"label": row.label, "side": row.side, "calls": row.calls} | values


def _held_out(found: Mapping[str, Any], scale: float) -> str:
    """One table a guidance scale; the pairs kept are those exact enough for the smallest error in the table."""
    rows, lines = found["held_out"][scale], []
    lines.append("| calls | | solver, schedule | latent MSE | ratio | PSNR | distance | variance | dropped |")
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for calls in sorted({r.calls for r in rows}):
        here = [r for r in rows if r.calls == calls]
        smallest = min(float(np.median(r.scores["mse"])) for r in here)
        kept = np.asarray(found["errors"][scale]) <= SHARE * smallest
        prompts = [p for (p, _), k in zip(found["pairs"], kept, strict=True) if k]
        if len(set(prompts)) < 2:
            lines.append(f"| {calls} | | no pair's reference is exact enough | | | | | | {(~kept).sum()} |")
            continue
        theirs = [r for r in here if r.side == "theirs"]
        best = min(theirs or here, key=lambda r: np.median(np.asarray(r.scores["mse"])[kept]))
        for r in sorted(here, key=lambda r: np.median(np.asarray(r.scores["mse"])[kept])):
            s, mse = _summary(r, kept), np.asarray(r.scores["mse"])[kept]
            ratio = paired_interval(mse, np.asarray(best.scores["mse"])[kept], prompts)
            lines.append(
                f"| {calls} | {r.side} | {r.label} | {s['mse']:.2e} | {ratio.median:.2f} [{ratio.low:.2f}, "
                f"{ratio.high:.2f}] | {s['psnr']:.2f} | {s.get('clip', float('nan')):.4f} | {s['variance']:.3f} "
                f"| {(~kept).sum()} |"
            )
    return "\n".join([*lines, ""])


def _best_of(rows: Sequence[Any], key: int) -> str:
    """Table of the smallest screening error of each solver (key 0) or schedule (key 1), by calls."""
    best: dict[str, dict[int, Any]] = defaultdict(dict)
    for r in rows:
        name = r.label.split()[key]
        if r.calls not in best[name] or r.error() < best[name][r.calls].error():
            best[name][r.calls] = r
    calls = sorted({r.calls for r in rows})
    head = ("solver", "schedule")[key]
    lines = [
        f"| {head} | " + " | ".join(f"{k} calls | with" for k in calls) + " |",
        "|---" * (1 + 2 * len(calls)) + "|",
    ]
    for name, by in sorted(best.items(), key=lambda item: geometric_mean([r.error() for r in item[1].values()])):
        cells = [
            f"{by[k].error():.2e} | {by[k].label.replace(name, '', 1).strip()}" if k in by else "- | " for k in calls
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _by_solver(rows: Sequence[Any]) -> str:
    return "Best of the schedules tried with it, on the screening pairs, in the order of the geometric mean.\n\n" + (
        _best_of(rows, 0)
    )


def _by_schedule(rows: Sequence[Any]) -> str:
    return "Best of the solvers tried on it, on the screening pairs.\n\n" + _best_of(rows, 1)


def _noisy(rows: Sequence[Any]) -> str:
    text = "They sample the reverse SDE: their pictures are others, and not the worse for it. Screening pairs.\n\n"
    lines = ["| solver, schedule | calls | distance | variance |", "|---|---|---|---|"]
    for r in rows:
        distance, variance = np.median(r.scores["clip"]), np.median(r.scores["variance"])
        lines.append(f"| {r.label} | {r.calls} | {distance:.4f} | {variance:.3f} |")
    return text + "\n".join([*lines, ""])


def _plot(found: Mapping[str, Any]) -> Any:
    """Median latent MSE against calls: ours best, theirs best, the baselines; one panel a guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scales = list(found["held_out"])
    figure, axes = plt.subplots(1, len(scales), figsize=(5.2 * len(scales), 4.2), squeeze=False, sharey=True)
    for axis, scale in zip(axes[0], scales, strict=True):
        rows = found["held_out"][scale]
        curves: dict[str, dict[int, float]] = defaultdict(dict)
        for r in rows:
            value = float(np.median(r.scores["mse"]))
            for name in (f"best of {'ours' if r.side == 'ours' else 'Diffusers'}", r.label):
                curves[name][r.calls] = min(value, curves[name].get(r.calls, np.inf))
        shown = ["best of ours", "best of Diffusers", *(n for n in curves if n.startswith(("ddim", "dpmpp_2m karras")))]
        for name in shown:
            points = sorted(curves[name].items())
            axis.plot(*zip(*points, strict=True), marker="o", label=name, lw=2 if "best" in name else 1)
        axis.set(title=f"guidance scale {scale:g}", xlabel="network calls", xscale="log", yscale="log")
        axis.set_xticks(sorted({r.calls for r in rows}), [str(k) for k in sorted({r.calls for r in rows})])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("median latent MSE to the converged solution")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure
