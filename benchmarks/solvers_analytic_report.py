"""Report of `solvers_analytic.py`: Markdown, JSON and a plot."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel.pictures import save_text

if TYPE_CHECKING:
    from solvers_analytic import Found, Row

NAME = "solvers_analytic"
PLOTTED = ("ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpm_2m", "unipc_1_bh1", "unipc", "unipc_3")
PLOTTED += ("deis_tab3", "ipndm", "heun", "res_3m")
TOP = 10


def write_report(found: Found, folder: Path) -> None:
    """Write the three files into `folder`."""
    parts = [_head(found), *_tops(found), _per_solver(found), _per_schedule(found), _flow(found), _stochastic(found)]
    if found.refused:
        lines = [f"- `{name}`: {reason}" for name, reason in found.refused.items()]
        parts.append("## Not run\n\n" + "\n".join(lines))
    parts.append(f"![Error against network calls]({NAME}.png)")
    save_text("\n\n".join(part for part in parts if part) + "\n", folder / f"{NAME}.md")
    save_text(json.dumps(_as_json(found), separators=(",", ":")) + "\n", folder / f"{NAME}.json")
    _plot(found, folder / f"{NAME}.png")


def _head(found: Found) -> str:
    mixtures, noises = found.starts
    kinds = "; ".join(
        f"*{kind}*: standard deviation {std:.2f}, ending at sigma = 0 would move the solution by {moved:.1e}"
        for kind, (std, moved) in found.data.items()
    )
    return f"""# Solvers against the exact solution: Gaussian mixtures

- Data: {mixtures} mixtures of 6 Gaussians in 64 (8 x 8) dimensions, whose scores are known exactly, {noises} starting
  noises of each, float64. Means of standard deviation 0.8; inside a component the standard deviations go from 0.6 down to
  0.03 (*detailed*, the data of all tables that do not say otherwise), or are all 0.35 (*smooth*).
- Noise schedule of Stable Diffusion (1000 scaled-linear betas, 0.00085 to 0.012), exact times. What is run is
  `diffaccel.scheduler(solver, config, schedule=..., final=...)` through `step`, with its defaults. diffaccel
  {version("diffaccel")}, torch {version("torch")}.
- Truth: the probability-flow ODE from the same noise at the most trained noise to the least (sigma 0.029) by DOP853 at
  a relative tolerance of 1e-12, and there the x0 prediction: what solvers that end at 0 converge to on grids that
  call the network at that sigma ({kinds}).
- Error: root mean square over the 64 numbers of a sample, median over the {mixtures * noises} starts.
- `*` marks runs that end at sigma_min and leave its noise in the sample, which counts against them. Runs to sigma_min
  that are the run to 0 are not run twice; `euler` is `ddim` here, and `deis_rho2heun` is `heun`.
- **Exact scores: this ranks solvers without network error.** On a trained network, which is rough in t and which a
  guidance scale bends, the order is another one: see [solvers_emoji-sd.md](solvers_emoji-sd.md)."""


def _calls(found: Found) -> list[int]:
    return sorted({n for row in found.rows["detailed"] for n in row.errors})


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def _grid(row: Row) -> str:
    return row.schedule + "*" * (row.final == "sigma_min")


def _ranked(rows: list[Row], calls: int) -> list[Row]:
    return sorted((row for row in rows if calls in row.errors), key=lambda row: row.errors[calls])


def _tops(found: Found) -> list[str]:
    """The best of everything, per kind of data."""
    calls, texts = _calls(found), []
    for kind in found.data:
        ranked = {n: _ranked(found.rows[kind], n)[:TOP] for n in calls}
        cells = [
            [str(place + 1)]
            + [
                f"{row.solver}, {_grid(row)} {row.errors[n]:.1e}" if row else ""
                for n in calls
                for row in [ranked[n][place] if place < len(ranked[n]) else None]
            ]
            for place in range(max(len(rows) for rows in ranked.values()))
        ]
        title = f"## The best {TOP} at each number of network calls: {kind} data"
        texts.append(f"{title}\n\n{_table(['', *map(str, calls)], cells)}")
    return texts


def _per_solver(found: Found) -> str:
    rows, calls = found.rows["detailed"], _calls(found)
    lines = [
        [name] + [f"{_grid(best[0])} {best[0].errors[n]:.1e}" if best else "" for n in calls for best in [own(n)]]
        for name in dict.fromkeys(row.solver for row in rows)
        for own in [lambda n, name=name: _ranked([row for row in rows if row.solver == name], n)]
    ]
    return "## The best schedule of each solver\n\n" + _table(["solver", *map(str, calls)], lines)


def _per_schedule(found: Found) -> str:
    rows, calls = found.rows["detailed"], _calls(found)
    lines = [
        [grid] + [f"{best[0].solver} {best[0].errors[n]:.1e}" if best else "" for n in calls for best in [own(n)]]
        for grid in sorted({_grid(row) for row in rows})
        for own in [lambda n, grid=grid: _ranked([row for row in rows if _grid(row) == grid], n)]
    ]
    return "## The best solver of each schedule\n\n" + _table(["schedule", *map(str, calls)], lines)


def _flow(found: Found) -> str:
    calls = _calls(found)
    lines = [
        [row.solver + "*" * (row.final == "sigma_min"), *(f"{row.errors[n]:.1e}" for n in calls)]
        for row in sorted(found.rows["flow"], key=lambda row: row.errors.get(calls[len(calls) // 2], 0.0))
        if all(n in row.errors for n in calls)
    ]
    text = (
        "## Flow path\n\nThe same data and noises on the straight path, schedule `flow` without a shift; truth to "
        f"sigma = 1 / 1000. In the order of the errors at {calls[len(calls) // 2]} calls."
    )
    return f"{text}\n\n{_table(['solver', *map(str, calls)], lines)}"


def _stochastic(found: Found) -> str:
    if not found.stochastic:
        return ""
    calls = list(next(iter(found.stochastic.values())))
    text = f"""## Stochastic solvers

One-dimensional Gaussian data of mean 1 and standard deviation 0.5, whose samples must have that mean and variance
whatever noise was added: relative errors in percent, mean / variance. {found.draws:,} draws from the exact marginal at the
first call, to sigma = 0; chance alone makes errors of about {50 * found.draws**-0.5:.2f} / {100 * (2 / found.draws) ** 0.5:.2f}. `ddim`
adds no noise and is there for comparison. The last step, from a prediction at sigma 0.029, costs 0.3 of the variance."""
    header = ["solver", *(f"{schedule}, {n}" for schedule in dict.fromkeys(s for _, s in found.stochastic) for n in calls)]
    rows = []
    for name in dict.fromkeys(name for name, _ in found.stochastic):
        cells = [pair for (solver, _), by_calls in found.stochastic.items() if solver == name for pair in by_calls.values()]
        rows.append([name, *(f"{100 * mean:+.1f} / {100 * variance:+.1f}" for mean, variance in cells)])
    return f"{text}\n\n{_table(header, rows)}"


def _as_json(found: Found) -> dict[str, Any]:
    return {
        "starts": found.starts,
        "data": found.data,
        "rows": {
            kind: [
                [row.solver, row.schedule, row.final, {n: float(f"{e:.4g}") for n, e in row.errors.items()}]
                for row in rows
            ]
            for kind, rows in found.rows.items()
        },
        "stochastic": [[*key, by_calls] for key, by_calls in found.stochastic.items()],
        "refused": found.refused,
    }


def _plot(found: Found, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    calls = _calls(found)
    figure, axes = plt.subplots(figsize=(8, 5))
    drawn = [r for r in found.rows["detailed"] if r.schedule == "logsnr" and r.final == "zero" and r.solver in PLOTTED]
    for i, row in enumerate(sorted(drawn, key=lambda row: PLOTTED.index(row.solver))):
        axes.plot(list(row.errors), list(row.errors.values()), "os^Dv"[i % 5] + "-", label=row.solver, color=f"C{i % 10}")
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="median RMSE", xticks=calls)
    axes.set_xticklabels([str(n) for n in calls])
    axes.minorticks_off()
    axes.set_title("Exact scores, log-SNR grid to sigma = 0")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
