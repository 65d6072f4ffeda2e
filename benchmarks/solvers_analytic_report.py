"""Report of `solvers_analytic.py`: Markdown, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffaccel.pictures import save_text

if TYPE_CHECKING:
    from solvers_analytic import Found, Row

NAME = "solvers_analytic"
PLOTTED = ("ddim", "heun", "dpmpp_2s", "ipndm", "deis_tab3", "unipc_1_bh1", "dpmpp_2m", "dpmpp_3m", "dpm_2m", "dpm_3m")
PLOTTED += ("unipc", "unipc_3")
TOP = 10


def write_report(found: Found, folder: Path) -> None:
    """Write the three files into `folder`."""
    parts = [
        _head(found),
        *_tops(found),
        _transfer(found),
        _per_solver(found),
        _per_schedule(found),
        _flow(found),
        _stochastic(found),
    ]
    if found.refused:
        lines = [f"- `{name}`: {reason}" for name, reason in found.refused.items()]
        parts.append("## Not run\n\n" + "\n".join(lines))
    parts.append(f"![Error against network calls]({NAME}.png)")
    save_text("\n\n".join(part for part in parts if part) + "\n", folder / f"{NAME}.md")
    save_text(json.dumps(_as_json(found), separators=(",", ":")) + "\n", folder / f"{NAME}.json")
    _plot(found, folder / f"{NAME}.png")


def _head(found: Found) -> str:
    mixtures, noises = found.starts
    kinds = "; ".join(f"{kind} data: {zero:.1e} and {least:.1e}" for kind, (_, zero, least) in found.data.items())
    return f"""# Solvers against the exact solution: Gaussian mixtures

- Data: {mixtures} mixtures of 6 Gaussians in 64 (8 x 8) dimensions, whose scores are known exactly; {noises} starting
  noises of each; float64. Means of standard deviation 0.8. Inside a component the standard deviations go from 0.6 down
  to 0.03 (*detailed*, the data of all tables that do not say otherwise), or are all 0.35 (*smooth*).
- Noise schedule of Stable Diffusion (1000 scaled-linear betas, 0.00085 to 0.012), exact times. What is run is
  `diffaccel.scheduler(solver, config, schedule=..., final=...)`, step by step and with its defaults. diffaccel
  {version("diffaccel")}, torch {version("torch")}.
- Truth: the probability-flow ODE from the same noise at the most trained noise to the least (sigma 0.029), by DOP853 at
  a relative tolerance of 1e-12, and the x0 prediction there. It is what runs to 0 converge to if their last call is at
  that sigma, and what `solver_tables.py` measures against. The ODE's own values at sigma = 0 and at sigma_min are off
  it by: {kinds}. Which end is better is a matter of
  definition below these errors.
- Error: root mean square over the 64 numbers of a sample (whose standard deviation is 0.8 to 0.9), median over the
  {mixtures * noises} starts.
- `*` marks runs that end at sigma_min (`final="sigma_min"`) and leave its noise in the sample; runs to sigma_min that
  are the run to 0 are not made twice. `euler` is `ddim` here, and `deis_rho2heun` is `heun`.
- **Exact scores: this ranks solvers without network error.** A trained network is rough in t, and guidance bends it;
  the order there is another one: see [solvers_emoji-sd.md](solvers_emoji-sd.md)."""


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
        ranked = [[(n, row) for row in _ranked(found.rows[kind], n)[:TOP]] for n in calls]
        places = zip(*ranked, strict=False)
        rows = [
            [str(i), *(f"{row.solver}, {_grid(row)} {row.errors[n]:.1e}" for n, row in place)]
            for i, place in enumerate(places, start=1)
        ]
        title = f"## The best {TOP} at each number of network calls: {kind} data"
        texts.append(f"{title}\n\n{_table(['', *map(str, calls)], rows)}")
    return texts


def _transfer(found: Found) -> str:
    """How much of the ranking is the data's."""
    ours, others = ({(r.solver, r.schedule, r.final): r.errors for r in found.rows[kind]} for kind in found.data)
    correlations, losses = [], []
    for n in _calls(found):
        names = [name for name in ours if n in ours[name]]
        a, b = (np.argsort(np.argsort([errors[name][n] for name in names])) for errors in (ours, others))
        correlations.append(f"{np.corrcoef(a, b)[0, 1]:.2f}" if len(names) > 1 else "")
        best = min(names, key=lambda name: ours[name][n])
        losses.append(f"{others[best][n] / min(others[name][n] for name in names):.1f}")
    text = """## Is the ranking one of the data?

Rank correlation of all solvers and schedules between the two kinds of data, and how much further off the best of the
detailed data is on the smooth than the best there."""
    rows = [["rank correlation", *correlations], ["detailed's best on smooth / smooth's best", *losses]]
    return f"{text}\n\n{_table(['calls', *map(str, _calls(found))], rows)}"


def _per_solver(found: Found) -> str:
    solvers = dict.fromkeys(row.solver for row in found.rows["detailed"])
    return "## The best schedule of each solver\n\n" + _best_of(found, "solver", solvers, lambda row: row.solver, _grid)


def _per_schedule(found: Found) -> str:
    grids = sorted({_grid(row) for row in found.rows["detailed"] if len(row.errors) == len(_calls(found))})
    return "## The best solver of each schedule\n\n" + _best_of(found, "schedule", grids, _grid, lambda row: row.solver)


def _best_of(
    found: Found, title: str, names: Iterable[str], name_of: Callable[[Row], str], other_of: Callable[[Row], str]
) -> str:
    """One line for each of `names`, with the best of its rows at each number of calls."""
    lines, calls = [], _calls(found)
    for name in names:
        rows = [row for row in found.rows["detailed"] if name_of(row) == name]
        best = [(n, ranked[0]) for n in calls if (ranked := _ranked(rows, n))]
        lines.append([name, *(f"{other_of(row)} {row.errors[n]:.1e}" for n, row in best)])
    return _table([title, *map(str, calls)], lines)


def _flow(found: Found) -> str:
    calls = _calls(found)
    middle = calls[len(calls) // 2]
    whole = [row for row in found.rows["flow"] if len(row.errors) == len(calls)]
    lines = [
        [f"{row.solver}, {_grid(row)}", *(f"{row.errors[n]:.1e}" for n in calls)] for row in _ranked(whole, middle)[:60]
    ]
    text = f"""## Flow path

The same data and noises on the straight path, without a shift; the truth goes to sigma = 1/1000. On schedule `flow`,
SD3's own, runs to 0 make their last call there, right after one at some 1/n: a step of several units of log-SNR, which
multistep rules extrapolate over. `trailing` (the levels that Flux's pipeline passes) makes no such call. The best 60 in
the order of the errors at {middle}, and DPM++ 2M."""
    known = [
        [f"{r.solver}, {_grid(r)}", *(f"{r.errors[n]:.1e}" for n in calls)] for r in whole if r.solver == "dpmpp_2m"
    ]
    lines += [line for line in known if line not in lines]
    return f"{text}\n\n{_table(['solver, schedule', *map(str, calls)], lines)}"


def _stochastic(found: Found) -> str:
    if not found.stochastic:
        return ""
    calls = list(next(iter(found.stochastic.values())))
    schedules = dict.fromkeys(schedule for _, schedule in found.stochastic)
    chance = 50 * found.draws**-0.5, 100 * (2 / found.draws) ** 0.5
    text = f"""## Stochastic solvers

Gaussian data of mean 1 and standard deviation 0.5: relative errors, in percent, of the mean / variance of the samples.
{found.draws:,} runs from pure noise to sigma = 0; chance alone makes errors of {chance[0]:.1f} / {chance[1]:.1f}.
`ddim` adds no noise and is there for comparison: what is wrong with the start (pure noise has none of the mean that
Stable Diffusion's last timestep still has) stays in its samples, while noise makes solvers forget it. The last step,
from a prediction at sigma 0.029, costs 0.3 of the variance."""
    header = ["solver", *(f"{schedule}, {n}" for schedule in schedules for n in calls)]
    rows = []
    for name in dict.fromkeys(name for name, _ in found.stochastic):
        pairs = [pair for s in schedules for pair in found.stochastic[name, s].values()]
        rows.append([name, *(f"{_percent(mean)} / {_percent(variance)}" for mean, variance in pairs)])
    return f"{text}\n\n{_table(header, rows)}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}" if abs(share) < 10 else f"{100 * share:+.0e}"


def _as_json(found: Found) -> dict[str, Any]:
    return {
        "starts": found.starts,
        "data": found.data,
        "rows": {
            kind: [
                [row.solver, row.schedule, row.final, {n: float(f"{e:.3g}") for n, e in row.errors.items()}]
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
    drawn = {r.solver: r.errors for r in found.rows["detailed"] if r.schedule == "logsnr" and r.final == "zero"}
    for i, name in enumerate(name for name in PLOTTED if name in drawn):
        color = "k" if i == 10 else "gold" if i == 11 else f"C{i}"
        axes.plot(calls, [drawn[name][n] for n in calls], "os^DvPX*<>dh"[i] + "-", label=name, color=color)
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="median RMSE", xticks=calls)
    axes.set_xticklabels([str(n) for n in calls])
    axes.minorticks_off()
    axes.set_title("Exact scores, log-SNR grid to sigma = 0")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
