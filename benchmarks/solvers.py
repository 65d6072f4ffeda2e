"""Field guide: every solver and every schedule of ours at equal network calls, and what to pick.

`python benchmarks/solvers.py --guidance-scale 4 1 7.5` writes results/solvers_emoji-sd.md, .json and .png.

Screening: every deterministic solver on a few schedules, and every schedule with a few solvers, on the first eight
prompts of prompts.txt. The best of each number of calls are then scored on the held-out prompts, beside the best
settings of Diffusers that solver_tables.py found; see benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_candidates import Candidate, candidates
from our_candidates import OTHER_NETWORKS, SAME, Ours
from solver_results import geometric_mean
from solver_runs import Job, Runner, Setup, quiet
from solvers_report import write_report

from diffaccel.eval import ReferenceSettings
from diffaccel.samplers.catalog import SCHEDULES
from diffaccel.samplers.solvers import SOLVERS

HERE = Path(__file__).parent
SCREENING_PROMPTS = 8
SCREENING_CALLS = (5, 8, 10)
CALLS = {4: (5,), 5: (5,), 6: (5, 8), 8: (8,), 10: (10,), 20: (20,)}  # and which screening chooses for it
# Every solver runs on these, every schedule with those.
GRIDS = (("karras", "zero"), ("karras", "sigma_min"), ("logsnr", "zero"), ("beta", "zero"), ("beta", "sigma_min"))
GRIDS += (("trailing", "sigma_min"),)
SCHEDULE_SOLVERS = ("dpmpp_2m", "unipc_1_bh1", "deis_rhoab1")
# Options beyond the names. The product at the end was added after a first look at the screening (never at the scores).
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("unipc_1_bh1", {"schedule": s, "final": "corrector"}) for s in ("karras", "beta", "logsnr")),
    *(("dpmpp_2m", {"schedule": s, "final": "corrector"}) for s in ("karras", "beta", "logsnr")),
    *((n, {"schedule": "karras", "start": "singlestep"}) for n in ("dpmpp_2m", "dpmpp_3m", "deis_rhoab2", "res_3m")),
    *(("dpmpp_2m", {"schedule": "karras", "dual_fast": c}) for c in (0.1, 0.3)),
    *(("unipc_1_bh1", {"schedule": "karras", "dual_fast": c}) for c in (0.1, 0.3)),
    *(("gradient_estimation", {"schedule": "karras", "gamma": g}) for g in (1.25, 1.5)),
    *(
        (solver, {"schedule": s, "final": "sigma_min"} | options)
        for s in ("karras", "beta")
        for solver, options in (
            ("unipc_1", {"prediction": "epsilon"}),
            ("unipc", {"prediction": "epsilon"}),
            ("deis_tab1", {"corrector": True}),
            ("er_ode_3", {"order": 2}),
            ("unipc_1_bh1", {"prediction": "epsilon", "dual_fast": 0.1}),
            ("unipc_1_bh1", {"prediction": "epsilon", "dual_fast": 0.3}),
        )
    ),
    *(
        (solver, {"schedule": s, "final": "sigma_min"} | options)
        for s in (
            *("karras", "beta", "beta57", "trailing", "bong_tangent", "gradient_estimation"),
            *("quadratic", "kl_optimal", "linspace"),
        )
        for solver, options in (
            ("unipc_1_bh1", {"prediction": "epsilon"}),
            ("unipc_1_bh1", {"dual_fast": 0.2}),
            ("er_ode_3", {"order": 1, "corrector": True}),
            ("deis_rhoab1", {"corrector": True}),
            ("gradient_estimation", {"gamma": 1.25}),
            ("gradient_estimation", {"gamma": 1.5}),
            ("dpmpp_2s", {"second": "midpoint"}),
        )
    ),
)
BASELINES = (  # scored at every number of calls; the first is the package's default, which this table led to
    ("er_ode_3", {"schedule": "beta", "final": "sigma_min", "order": 1, "corrector": True}),
    ("ddim", {"schedule": "trailing"}),
    ("dpmpp_2m", {"schedule": "karras"}),
    ("unipc", {"schedule": "logsnr"}),
)
# Finalists of Diffusers in results/solver_tables_emoji-sd_cfg4.md, best of 970 settings on the same screening prompts.
THEIRS = (
    "DPMSolverMultistep trailing dpmsolver++ midpoint order=2 final=sigma_min lower_order_final=True",
    "DPMSolverMultistep trailing dpmsolver midpoint order=2 final=sigma_min lower_order_final=True",
    "DPMSolverMultistep karras dpmsolver midpoint order=2 final=sigma_min lower_order_final=True",
    "UniPCMultistep trailing order=1 bh1 final=sigma_min",
    "LMSDiscrete karras/linspace",
)


@dataclass(frozen=True)
class Row:
    """Measures of one candidate at a number of calls, one per pair."""

    label: str
    side: str
    calls: int
    scores: dict[str, list[float]]

    def error(self) -> float:
        """Geometric mean of the latent MSE."""
        return geometric_mean(self.scores["mse"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd")
    parser.add_argument("--clip", default="emoji-clip")
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[4.0], help="the first one chooses")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=4, help="seeds of each")
    parser.add_argument("--screening-seeds", type=int, default=2)
    parser.add_argument("--finalists", type=int, default=3, help="of ours, at each number of calls")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--only", default="", help="screen only candidates with this word in their label")
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    quiet()
    prompts = [line for line in (HERE / "prompts.txt").read_text().split("\n") if line]
    found: dict[str, Any] = {"held_out": {}, "errors": {}, "pairs": []}
    for scale in args.guidance_scale:
        setup = Setup(args.model, args.clip, scale, str(args.cache), ReferenceSettings(), args.compile)
        runner = Runner(setup, args.workers)
        try:
            if "screened" not in found:
                screening = tuple(prompts[:SCREENING_PROMPTS]), tuple(range(args.screening_seeds))
                found["screened"] = screen(runner, *screening, args.only)
                found["noisy"] = run(runner, stochastic(), SCREENING_CALLS[1:], *screening, images=True)
                found["weights"] = runner.weights[:16]
            held_out = tuple(prompts[SCREENING_PROMPTS:][: args.prompts]), tuple(range(args.seeds))
            reference = runner.reference(*held_out, setup.reference)
            chosen = {k: choose(found["screened"], k, args.finalists) for k in args.calls}
            rows = [run(runner, c, (k,), *held_out, images=True) for k, c in chosen.items()]
            found["held_out"][scale] = list(itertools.chain.from_iterable(rows))
            found["errors"][scale], found["pairs"] = reference.errors.tolist(), reference.pairs
        finally:
            runner.close()
        write_report(found, vars(args), args.output)


def screen(runner: Runner, prompts: tuple[str, ...], seeds: tuple[int, ...], only: str) -> list[Row]:
    """Every candidate of ours on the screening pairs."""
    runner.reference(prompts, seeds, runner.setup.reference)
    pool = [c for c in ours() if only in c.label]
    # At 20 calls the noise of sigma_min is all the error that is left: every solver, on three schedules, to zero.
    late = [c for c in pool if c.options["final"] == "zero" and c.options["schedule"] in ("karras", "logsnr", "beta")]
    return run(runner, pool, SCREENING_CALLS, prompts, seeds) + run(runner, late, (20,), prompts, seeds)


def run(
    runner: Runner,
    pool: Sequence[Ours | Candidate],
    calls: Sequence[int],
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    images: bool = False,
) -> list[Row]:
    """Rows of the candidates at each number of calls; those that cannot make it are left out."""
    jobs = [Job(c, k, prompts, seeds, images=images) for c in pool for k in calls]
    scores = runner.scores(f"CFG {runner.setup.guidance_scale:g}, {len(prompts)} prompts", jobs)
    return [
        Row(job.candidate.label, "ours" if isinstance(job.candidate, Ours) else "theirs", job.calls, s)
        for job, s in zip(jobs, scores, strict=True)
        if "fails" not in s
    ]


def choose(screened: Sequence[Row], calls: int, count: int) -> list[Ours | Candidate]:
    """Our best of the screening, one of each solver, the baselines, and the best of Diffusers."""
    known = {c.label: c for c in ours()}
    kept: list[Ours] = []
    for at in CALLS[calls]:
        ranked = sorted((r for r in screened if r.calls == at), key=Row.error)
        first = {known[r.label].solver: r for r in reversed(ranked)}  # the best row of each solver
        best = sorted(first.values(), key=Row.error)[:count]
        kept += [known[r.label] for r in best if known[r.label] not in kept]
    kept += [c for c in (candidate(*b) for b in BASELINES) if c.label not in {k.label for k in kept}]
    return [*kept, *(c for c in candidates() if c.label in THEIRS)]


def candidate(solver: str, options: dict[str, Any]) -> Ours:
    """A setting of ours under the label of its options."""
    options = {"final": "zero"} | options
    extra = "".join(f" {k}={v}" for k, v in options.items() if k not in ("schedule", "final"))
    return Ours(f"{solver} {options['schedule']} final={options['final']}{extra}", solver, options)


def ours() -> Iterator[Ours]:
    """Candidates of the screening, each once."""
    names = [name for name, rule in SOLVERS.items() if not rule.stochastic and name not in SAME]
    pairs = [(n, {"schedule": s, "final": f}) for n in names for s, f in GRIDS]
    schedules = [s for s in SCHEDULES if s not in OTHER_NETWORKS]
    pairs += [
        (n, {"schedule": s, "final": f})
        for n, s, f in itertools.product(SCHEDULE_SOLVERS, schedules, ("zero", "sigma_min"))
        if (s, f) not in GRIDS
    ]
    for solver, options in (*pairs, *VARIANTS):
        yield candidate(solver, options)


def stochastic() -> list[Ours]:
    """Solvers that add noise: they solve another equation, and are not ranked by the distance to the ODE's solution."""
    names = [name for name, rule in SOLVERS.items() if rule.stochastic]
    return [replace(candidate(n, {"schedule": s}), stochastic=True) for n in names for s in ("karras", "beta")]


if __name__ == "__main__":
    main()
