"""Searched samplers against fixed ones on emoji-sd, at equal network calls, on prompts and seeds that no search saw.

`python benchmarks/searched.py --guidance-scale 4 --steps 5 8` searches (minutes each; recipes that are there are kept),
scores, and writes results/searched_emoji-sd.md, .json and results/recipes/.

Searches get the 8 screening prompts and the last 8 of prompts.txt; held out are the 32 between them, those of
`solvers.py`. The fixed samplers are the finalists of both sides there. DC-Solver is also compared with the solver that
it compensates, on the same grid.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers_candidates import Candidate, candidates
from our_candidates import Ours
from solver_runs import Job, Runner, Setup, load_pipe, quiet
from solvers import BASELINES, THEIRS, candidate

import diffaccel
from diffaccel.eval import ReferenceSettings
from diffaccel.eval.fidelity import paired_interval
from diffaccel.pictures import save_text

HERE = Path(__file__).parent
SCREENING, HELD_OUT = 8, 32
# name -> (method, options): the methods with their defaults, and what else they can start from.
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": ("auto", {}),
    "auto-no-gradients": ("auto", {"iterations": 0}),
    "iia": ("iia", {}),
    "iia-all": ("iia", {"terms": "all"}),
    "dc-paper": ("dc", {}),
    "dc-best-grid": ("dc", {"solver": "unipc_1_bh1", "schedule": "beta", "final": "sigma_min"}),
    "gits": ("gits", {}),
    "ays": ("ays", {}),
    "usf": ("usf", {}),
    "autodiffusion": ("autodiffusion", {}),
}
FIXED = (  # ours: best of the screening of `solvers.py`, and what searches start from
    ("unipc_1_bh1", {"schedule": "gradient_estimation", "final": "sigma_min", "dual_fast": 0.2}),
    ("ipndm_2", {"schedule": "beta", "final": "sigma_min"}),
    ("unipc_1_bh1", {"schedule": "beta", "final": "sigma_min", "prediction": "epsilon"}),
    ("unipc_1_bh1", {"schedule": "beta", "final": "sigma_min"}),
    ("unipc", {"schedule": "linspace", "final": "sigma_min"}),
    *(
        ("dpmpp_2m", {"schedule": name}) for name in ("linspace", "karras", "logsnr", "ays_sd15")
    ),  # the solver of ays, gits
    BASELINES[0],
)
SAME_GRID = {  # searched -> fixed sampler on the same grid
    "dc-paper": "unipc linspace final=sigma_min",
    "dc-best-grid": "unipc_1_bh1 beta final=sigma_min",
}


@dataclass(frozen=True)
class Searched:
    """A recipe, with the interface of `diffusers_candidates.Candidate`."""

    label: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, config: Mapping[str, Any]) -> Any:
        """Its scheduler."""
        return diffaccel.Recipe.load(self.path).scheduler(dict(config))

    def arguments(self, config: Mapping[str, Any], calls: int) -> dict[str, Any]:
        """A step is a call."""
        return {"num_inference_steps": calls}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd")
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[4.0, 1.0, 7.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--pairs", type=int, default=48, help="that searches fit")
    parser.add_argument("--prompts", type=int, default=HELD_OUT, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    quiet()
    prompts = [line for line in (HERE / "prompts.txt").read_text().split("\n") if line]
    known, held_out = prompts[:SCREENING] + prompts[SCREENING + HELD_OUT :], prompts[SCREENING:][: args.prompts]
    rows: list[dict[str, Any]] = []
    for scale in args.guidance_scale:
        paths = searched(args, known, scale)
        rows += scored(args, paths, tuple(held_out), scale)
        save_text(
            json.dumps({"settings": _said(args), "rows": rows}, indent=1) + "\n", args.output / _name(args, "json")
        )
        save_text(report(rows, args), args.output / _name(args, "md"))


def searched(args: argparse.Namespace, prompts: list[str], scale: float) -> dict[tuple[str, int], Path]:
    """Recipes by search and steps; those on disk are not searched again."""
    folder = args.output / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_pipe(args.model)
    paths = {
        (n, k): folder / f"{Path(args.model).name}-{n}-{k}-cfg{scale:g}.json" for n in args.searches for k in args.steps
    }
    for (name, steps), path in paths.items():
        if not path.exists():
            method, options = SEARCHES[name]
            print(f"{name}, {steps} steps, guidance {scale:g}", flush=True)
            given: dict[str, Any] = {"pairs": args.pairs, "cache": args.cache / "searches", **options}
            recipe = diffaccel.search(pipe, method, prompts=prompts, steps=steps, guidance_scale=scale, **given)
            recipe.save(path)
    return paths


def scored(
    args: argparse.Namespace, paths: dict[tuple[str, int], Path], prompts: tuple[str, ...], scale: float
) -> list[dict[str, Any]]:
    """Held-out measures of recipes and fixed samplers."""
    runner = Runner(Setup(args.model, args.clip, scale, str(args.cache), ReferenceSettings()), args.workers)
    try:
        seeds = tuple(range(args.seeds))
        runner.reference(prompts, seeds, runner.setup.reference)
        fixed: list[Ours | Candidate] = [candidate(*one) for one in FIXED]
        fixed += [c for c in candidates() if c.label in THEIRS]
        jobs = [Job(c, k, prompts, seeds, images=True) for k in args.steps for c in fixed]
        for (name, steps), path in paths.items():
            if any(diffaccel.Recipe.load(path).entries[0].notes.get("skips") or ()):
                continue  # a scheduler alone does not leave out layers
            # the file's content is part of the key under which scores are kept
            options = {"recipe": path.read_text()}
            jobs.append(Job(Searched(name, str(path), options), steps, prompts, seeds, images=True))  # pyright: ignore
        out = []
        for job, scores in zip(jobs, runner.scores(f"guidance {scale:g}", jobs), strict=True):
            if "fails" not in scores:
                side = {Searched: "searched", Ours: "ours"}.get(type(job.candidate), "theirs")  # pyright: ignore
                out.append({"scale": scale, "label": job.candidate.label, "side": side, "calls": job.calls, **scores})
        return out
    finally:
        runner.close()


def report(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """The tables as Markdown."""
    model = Path(args.model).name
    out = [f"# Searched samplers, {model}, {args.prompts} held-out prompts x {args.seeds} seeds\n"]
    out += [
        "Median latent MSE to the converged solution; ratios are medians over pairs, with 95 % intervals (bootstrap by "
        "prompt), against the best of Diffusers and the best fixed sampler of ours *in this table* at equal calls.\n"
    ]
    owners = [prompt for prompt in range(args.prompts) for _ in range(args.seeds)]
    for scale in dict.fromkeys(row["scale"] for row in rows):
        for calls in dict.fromkeys(row["calls"] for row in rows if row["scale"] == scale):
            here = [row for row in rows if row["scale"] == scale and row["calls"] == calls]
            best = {side: min((r for r in here if r["side"] == side), key=_error) for side in ("theirs", "ours")}
            out += [f"\n## guidance {scale:g}, {calls} calls\n"]
            out += [
                "| sampler | latent MSE | / best Diffusers | / best fixed of ours | PSNR | CLIP distance | variance |"
            ]
            out += ["|---|--:|--:|--:|--:|--:|--:|"]
            for row in sorted(here, key=_error):
                against = [_ratio(row, best[side], owners) for side in ("theirs", "ours")]
                name = f"**{row['label']}**" if row["side"] == "searched" else f"{row['label']} ({row['side']})"
                measures = [
                    f"{np.median(row[key]):.3g}" if row.get(key) else "" for key in ("psnr", "clip", "variance")
                ]
                out.append(f"| {name} | {np.median(row['mse']):.4g} | {' | '.join([*against, *measures])} |")
            named = {row["label"]: row for row in here}
            for search, base in SAME_GRID.items():
                if search in named and base in named:
                    mean = np.mean(named[search]["mse"]) / np.mean(named[base]["mse"])
                    said = _ratio(named[search], named[base], owners)
                    out.append(f"\n{search} / {base}, the same grid: {said}; ratio of the means {mean:.3f}.")
    return "\n".join(out) + "\n"


def _error(row: dict[str, Any]) -> float:
    return float(np.median(row["mse"]))


def _ratio(row: dict[str, Any], other: dict[str, Any], owners: Sequence[int]) -> str:
    if row is other:
        return "1"
    found = paired_interval(row["mse"], other["mse"], owners)
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _name(args: argparse.Namespace, suffix: str) -> str:
    return f"searched_{Path(args.model).name}.{suffix}"


def _said(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key not in ("cache", "output", "workers")}


if __name__ == "__main__":
    main()
