"""What the solver benchmark found, as Markdown, JSON and a plot."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from diffusers_candidates import NOT_USABLE
from solver_results import SHARE, Entry, Results, answers, geometric_mean, median, ratio, spearman

from diffaccel.eval import Interval


def write_report(results: Results, folder: Path, name: str) -> None:
    """Write `name`.md, .json and .png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = results.converged()
    parts = [_head(results, kept), _same_grid(results, kept), _best(results, kept), _questions(results)]
    parts += [_checks(results), _screening(results), _failures(results)]
    (folder / f"{name}.md").write_text("\n\n".join(part for part in parts if part) + f"\n\n![error]({name}.png)\n")
    (folder / f"{name}.json").write_text(json.dumps(_as_json(results, kept), indent=1) + "\n")
    _plot(results, kept, folder / f"{name}.png")


def _head(results: Results, kept: np.ndarray) -> str:
    h, r = results.header, results.header["reference"]
    packages = ", ".join(f"{p} {version(p)}" for p in ("diffaccel", "torch", "diffusers", "transformers"))
    return f"""# Solvers at equal network calls: `{h["model"]}`, guidance scale {h["guidance_scale"]:g}

- Weights and noise schedule: `{h["weights"]}` (SHA-256). {packages}, Python {platform.python_version()}.
- Held-out pairs: {h["prompts"]} prompts x {h["seeds"]} seeds = {len(kept)}. **Dropped: {int((~kept).sum())}**, whose
  reference is not converged (N and 2N steps differ by more than {SHARE:.0%} of the smallest median error below).
- Reference: {r["solver"]} {r["schedule"]}, N = {r["steps"]} and 2N steps, {r["timesteps"]} clock, to sigma = 0.
- What is best was chosen on {h["screening_prompts"]} other prompts x {h["screening_seeds"]} seeds, by the geometric
  mean of the latent MSE.
- Latent MSE and PSNR (dB) to the reference; `{h["clip"] or "no CLIP model"}` distance to its pictures. Medians over
  pairs; "ours / theirs" is the median of the paired ratio, with a 95 % interval by bootstrap over prompts. A call is
  one run of the network on a guided pair of rows."""


def _table(header: str, rows: list[list[str]]) -> str:
    columns = header.split(" | ")
    lines = [header.join(("| ", " |")), "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


MEASURES = "latent MSE theirs | ours | ours / theirs | PSNR theirs | ours | distance theirs | ours"


def _same_grid(results: Results, kept: np.ndarray) -> str:
    rows = [
        [grid, str(calls), theirs.label, ours.label, *_measures(results, kept, theirs, ours)]
        for grid, calls, theirs, ours in results.same_grid
    ]
    text = (
        "## A. Same grid: the solver alone\n\nEach side's best solver, by the screening, among those that tell the "
        "network exactly these times and end at sigma = 0."
    )
    return f"{text}\n\n" + _table(f"grid | calls | theirs | ours | {MEASURES}", rows)


def _best(results: Results, kept: np.ndarray) -> str:
    rows = []
    for calls, theirs in results.best["theirs"].items():
        ours = results.best["ours"][calls]
        rows.append([str(calls), theirs[0].label, ours[0].label, *_measures(results, kept, theirs[0], ours[0])])
    others = [
        [str(calls), side, entry.label, f"{entry.screening_error:.2e}", *_medians(entry, kept)]
        for side, found in results.best.items()
        for calls, entries in found.items()
        for entry in entries
    ]
    text = "## B. Best against best, each on its own best grid"
    more = "All finalists, in the order of the screening:"
    return f"{text}\n\n{_table(f'calls | theirs | ours | {MEASURES}', rows)}\n\n{more}\n\n" + _table(
        "calls | side | solver and grid | error in screening | latent MSE | PSNR | distance", others
    )


def _measures(results: Results, kept: np.ndarray, theirs: Entry, ours: Entry) -> list[str]:
    a, b = _medians(theirs, kept), _medians(ours, kept)
    return [a[0], b[0], _text(ratio(results, kept, ours, theirs)), a[1], b[1], a[2], b[2]]


def _medians(entry: Entry, kept: np.ndarray) -> list[str]:
    clip = f"{median(entry.clip, kept):.4f}" if entry.clip else "n/a"
    return [f"{median(entry.mse, kept):.2e}", f"{median(entry.psnr, kept):.2f}", clip]


def _dropped(kept: np.ndarray) -> str:
    return f"{int((~kept).sum())} of {len(kept)}"


def _text(interval: Interval | None) -> str:
    if interval is None:
        return "too few pairs"
    return f"{interval.median:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _questions(results: Results) -> str:
    parts = []
    for letter, title in zip("CDEF", dict.fromkeys(q.title for q in results.questions), strict=False):
        rows = [
            [q.grid, str(q.calls), *(f"{median(x, kept):.2e}" for x in (q.a, q.b)), _text(interval), _dropped(kept)]
            for q, kept, interval in answers(results)
            if q.title == title
        ]
        parts.append(f"## {letter}. {title}\n\n" + _table("grid | calls | first | second | ratio | dropped", rows))
    return "\n\n".join(parts)


def _checks(results: Results) -> str:
    """Whether another reference would have said something else."""
    clock, noisy = (float(np.median(values)) for values in results.checks)
    rows = []
    for side, found in results.screened.items():
        for calls, screened in found.items():
            main = [geometric_mean(s.mse[: len(s.mse_against[0])]) for s in screened]
            for name, i in (("integer clock", 0), ("end at sigma_min", 1)):
                other = [geometric_mean(s.mse_against[i]) for s in screened]
                first = screened[int(np.argmin(other))].candidate.label
                same = "same" if int(np.argmin(other)) == int(np.argmin(main)) else first
                rows.append([side, str(calls), name, f"{spearman(main, other):.4f}", f"{min(other):.2e}", same])
    text = (
        f"## Checks of the reference\n\nMedian MSE between the reference and (1) one on the "
        f"integer clock, {clock:.1e}; (2) one that ends at sigma_min, its noise left in, {noisy:.1e}. Rank correlation "
        "of the candidates run on all of these pairs between the reference and each of these, and who would win:"
    )
    return f"{text}\n\n" + _table("side | calls | reference | rank correlation | smallest MSE | winner", rows)


def _screening(results: Results, top: int = 8) -> str:
    rows = [
        [str(calls), side, s.candidate.label, f"{s.error:.2e}", str(len(s.mse)), str(len(s.same))]
        for side, found in results.screened.items()
        for calls, screened in found.items()
        for s in screened[:top]
    ]
    text = (
        f"## Screening: the best {top} of each side\n\nGeometric mean of the latent MSE; aliases are the same method."
    )
    return f"{text}\n\n" + _table("calls | side | solver and grid | error | pairs | aliases", rows)


def _failures(results: Results) -> str:
    lines = [f"- {len(who)} x fails: {why} (first: {who[0]})" for why, who in sorted(results.failures.items())]
    lines += [f"- {name}: not tried: {why}" for name, why in NOT_USABLE.items()]
    stochastic = results.header["stochastic_not_ranked"]
    lines.append(f"- {stochastic} settings add noise and sample the SDE: not ranked against the solution of the ODE")
    return "## Not ranked\n\n" + "\n".join(lines)


def _as_json(results: Results, kept: np.ndarray) -> dict[str, Any]:
    def entry(e: Entry) -> dict[str, Any]:
        clip = median(e.clip, kept) if e.clip else None
        both = {"latent_mse": median(e.mse, kept), "latent_mse_all_pairs": float(np.median(e.mse))}
        return {"label": e.label, "calls": e.calls} | both | {"psnr": median(e.psnr, kept), "clip_distance": clip}

    def pair(theirs: Entry, ours: Entry) -> dict[str, Any]:
        ratios = {"ratio": ratio(results, kept, ours, theirs)}
        ratios["ratio_all_pairs"] = ratio(results, np.ones_like(kept), ours, theirs)
        return {"theirs": entry(theirs), "ours": entry(ours)} | {k: v and vars(v) for k, v in ratios.items()}

    best = results.best
    return {
        "header": results.header | {"pairs": len(kept), "dropped": int((~kept).sum())},
        "same_grid": [{"grid": g, "calls": k} | pair(theirs, ours) for g, k, theirs, ours in results.same_grid],
        "best": [{"calls": k} | pair(best["theirs"][k][0], best["ours"][k][0]) for k in best["theirs"]],
        "finalists": {side: [entry(e) for es in found.values() for e in es] for side, found in best.items()},
        "questions": [
            {"title": q.title, "grid": q.grid, "calls": q.calls, "first": median(q.a, k), "second": median(q.b, k)}
            | {"ratio": i and vars(i), "dropped": int((~k).sum())}
            for q, k, i in answers(results)
        ],
        "reference_checks": dict(zip(("integer_clock", "ends_at_sigma_min"), results.checks, strict=True)),
        "screening": {
            side: {str(k): {s.candidate.label: s.error for s in found} for k, found in by_calls.items()}
            for side, by_calls in results.screened.items()
        },
        "failures": results.failures,
    }


def _plot(results: Results, kept: np.ndarray, file: Path) -> None:
    """Error against network calls: every screened candidate as a dot, each side's best on the held-out pairs."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    for side, color, shift in (("theirs", "tab:gray", 0.12), ("ours", "tab:red", -0.12)):
        dots = [(k - shift, s.error) for k, found in results.screened[side].items() for s in found]
        axes.scatter(*zip(*dots, strict=True), s=6, color=color, alpha=0.3, linewidths=0)
        best = {k: entries[0] for k, entries in sorted(results.best[side].items())}
        name = "diffaccel" if side == "ours" else "Diffusers"
        medians = [median(e.mse, kept) for e in best.values()]
        axes.plot(list(best), medians, "o-", color=color, label=f"{name}, best on its best grid")
    axes.set(yscale="log", xlabel="network calls", ylabel="median latent MSE to the converged solution")
    axes.set(title=f"{results.header['model']}, guidance scale {results.header['guidance_scale']:g}")
    axes.set_xticks(results.header["steps"])
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
