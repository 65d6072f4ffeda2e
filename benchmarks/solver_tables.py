"""Solver tables: ours against every Diffusers scheduler, at equal network calls and on the same time grids.

`python benchmarks/solver_tables.py --prompts 32 --seeds 4 --guidance-scale 4 --steps 5 8 10`

What is best is found on the first eight prompts of prompts.txt and scored on the others. How each number is made is
written in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers_candidates import Candidate, candidates
from dry_run import Trace
from our_candidates import Ours, our_candidates
from solver_report import write_report
from solver_results import Entry, Question, Results, Screened
from solver_runs import Job, Runner, Setup, quiet

from diffaccel import zoo
from diffaccel.eval import ReferenceSettings

HERE = Path(__file__).parent
SCREENING_PROMPTS = 8
GRIDS = ("trailing", "linspace", "leading", "karras", "AYS")
QUESTION_STEPS = (5, 6, 8, 10, 12, 15, 20)
QUESTION_GRIDS = ("logsnr", "trailing", "karras")
KEEP = ((60, 6), (30, 4), (8, 2))  # candidates that go into the next round, and those of each grid of table A
Scheduler = Candidate | Ours
Block = tuple[tuple[str, ...], tuple[int, ...]]  # prompts, and seeds of each


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-sd", help="zoo name, or folder of a Stable Diffusion pipeline")
    parser.add_argument("--clip", default="emoji-clip", help="zoo name or folder of the CLIP model; '' for none")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=4, help="seeds of each held-out prompt")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10], help="network calls")
    parser.add_argument("--reference-steps", type=int, default=100, help="N; the reference has 2N steps")
    parser.add_argument("--finalists", type=int, default=3, help="scored on the held-out prompts, of each side")
    parser.add_argument("--question-prompts", type=int, default=8, help="held-out prompts of tables C and D; 0: none")
    parser.add_argument("--only", nargs="+", default=[], help="keep candidates with all these words in their label")
    parser.add_argument("--screening-prompts", type=int, default=SCREENING_PROMPTS)
    parser.add_argument("--screening-seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 1 on an accelerator")
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Results:
    args = arguments(argv)
    lines = (HERE / "prompts.txt").read_text().split("\n")
    prompts = [line for line in lines if line]
    held_out = tuple(prompts[SCREENING_PROMPTS:][: args.prompts])
    if len(held_out) < args.prompts:
        sys.exit(f"prompts.txt has {len(prompts) - SCREENING_PROMPTS} held-out prompts, not {args.prompts}")
    reference = ReferenceSettings(steps=args.reference_steps)
    setup = Setup(args.model, args.clip, args.guidance_scale, str(args.cache), reference)
    quiet()
    runner = Runner(setup, args.workers)
    try:
        bench = Bench(args, runner, tuple(prompts[: args.screening_prompts]), held_out, tuple(range(args.seeds)))
        results = bench.run()
    finally:
        runner.close()
    name = f"solver_tables_{Path(args.model).name}_cfg{args.guidance_scale:g}"
    write_report(results, args.output, name)
    return results


@dataclass
class Bench:
    """The stages of the benchmark, each resumable through the runner's cache."""

    args: argparse.Namespace
    runner: Runner
    screening: tuple[str, ...]
    held_out: tuple[str, ...]
    seeds: tuple[int, ...]
    failures: dict[str, list[str]] = field(default_factory=dict)
    against: tuple[ReferenceSettings, ...] = ()
    checked: list[Block] = field(default_factory=list)

    def run(self) -> Results:
        """All stages."""
        setup, steps = self.runner.setup, self.args.steps
        # Would another idea of "the solution" have said something else?
        self.against = (replace(setup.reference, timesteps="integer"), replace(setup.reference, final="sigma_min"))
        self.checked = [block for blocks in self.rounds() for block in blocks if block[1] == (0,)][:2]
        prompts = tuple(prompt for prompts, _ in self.checked for prompt in prompts)
        checks = [self.runner.reference(prompts, (0,), s) for s in (setup.reference, *self.against)]
        self.runner.reference(self.screening, range(self.args.screening_seeds), setup.reference)
        pools: dict[str, list[Scheduler]] = {"theirs": list(candidates()), "ours": list(our_candidates())}
        for side, pool in pools.items():
            pools[side] = [c for c in pool if all(word in c.label for word in self.args.only)]
            if not pools[side]:
                sys.exit(f"no candidate of {side} has all of {self.args.only} in its label")
        screened = {side: {k: self.screen(side, pool, k) for k in steps} for side, pool in pools.items()}
        reference = self.runner.reference(self.held_out, self.seeds, setup.reference)
        best = {side: {k: screened[side][k][: self.args.finalists] for k in steps} for side in pools}
        same = [(grid, k, *pair) for k in steps for grid in GRIDS if (pair := self.same_grid(grid, k, screened))]
        chosen = [(s, k) for found in best.values() for k in steps for s in found[k]]
        chosen += [(s, k) for _, k, *pair in same for s in pair]
        scored = dict(zip([(s.candidate.label, k) for s, k in chosen], self.score(chosen), strict=True))
        return Results(
            header=self.header(sum(c.stochastic for c in pools["theirs"])),
            pairs=reference.pairs,
            reference_errors=reference.errors.tolist(),
            checks=[((c.latents - checks[0].latents).square().flatten(1).mean(1)).tolist() for c in checks[1:]],
            screened=screened,
            failures=self.failures,
            same_grid=[(g, k, scored[a.candidate.label, k], scored[b.candidate.label, k]) for g, k, a, b in same],
            best={
                side: {k: [scored[s.candidate.label, k] for s in found] for k, found in by_calls.items()}
                for side, by_calls in best.items()
            },
            questions=self.questions(),
        )

    def header(self, stochastic: int) -> dict[str, Any]:
        """What was run on what."""
        args, setup = self.args, self.runner.setup
        clip = args.clip if args.clip in zoo.NAMES else Path(args.clip).name
        return {
            "model": args.model,
            "weights": self.runner.weights[:16],
            "clip": clip,
            "guidance_scale": args.guidance_scale,
            "prompts": len(self.held_out),
            "seeds": len(self.seeds),
            "screening_prompts": len(self.screening),
            "screening_seeds": self.args.screening_seeds,
            "steps": list(args.steps),
            "reference": vars(setup.reference),
            "stochastic_not_ranked": stochastic,
        }

    def screen(self, side: str, pool: Sequence[Scheduler], calls: int) -> list[Screened]:
        """Distinct candidates by their error on the screening prompts, best first, in rounds of fewer on more pairs.

        A few pairs are enough to see what is bad, and choose the luckiest among the good: the ranking of 300 candidates
        on 4 pairs put one first that was 4 times as far off on others.
        """
        found = self.distinct(side, [c for c in pool if not c.stochastic], calls)
        first, *later = self.rounds()
        ranked = sorted(self.screen_on(found, first, calls), key=lambda s: s.error)
        for (keep, keep_of_grid), blocks in zip(KEEP, later, strict=False):
            kept = ranked[:keep]
            # What is best on a grid of table A stays in, however bad the grid is.
            for trace in (self.grid_trace(grid, calls) for grid in GRIDS):
                on_grid = [s for s in ranked if trace and s.trace.grid == trace.grid]
                kept += [s for s in on_grid[:keep_of_grid] if s not in kept]
            better = sorted(self.screen_on(kept, blocks, calls), key=lambda s: s.error)
            labels = {s.candidate.label for s in better}
            ranked = better + [s for s in ranked if s.candidate.label not in labels]
        return ranked

    def rounds(self) -> list[list[Block]]:
        """Prompts and seeds that each round adds."""
        prompts, seeds = self.screening, tuple(range(self.args.screening_seeds))
        few, some = len(prompts) // 4 or 1, len(prompts) // 2 or 1
        rounds = [[(prompts[:few], seeds[:1])], [(prompts[few:some], seeds[:1])]]
        rounds += [[(prompts[some:], seeds[:1]), (prompts, seeds[1:2])], [(prompts, seeds[2:])]]
        return [found for blocks in rounds if (found := [(p, s) for p, s in blocks if p and s])]

    def screen_on(self, found: Sequence[Screened], blocks: list[Block], calls: int) -> list[Screened]:
        """The candidates with the latent MSE of these pairs added; those that fail are recorded and left out."""
        found = list(found)
        for prompts, seeds in blocks:
            against = self.against if (prompts, seeds) in self.checked else ()
            jobs = [Job(s.candidate, calls, prompts, seeds, against=against) for s in found]
            scores = self.runner.scores(f"screening, {calls} calls", jobs)
            for s, r in zip(found, scores, strict=True):
                if "fails" in r:
                    self.failures.setdefault(r["fails"], []).append(f"{s.candidate.label} ({calls} calls)")
            found = [s.with_pairs(r) for s, r in zip(found, scores, strict=True) if "fails" not in r]
        return found

    def distinct(self, side: str, pool: Sequence[Scheduler], calls: int) -> list[Screened]:
        """One candidate of each method: those that do the same on the toy network are one."""
        traces: list[Trace | str] = [""] * len(pool)
        for i, trace in self.runner.map(f"{side}, {calls} calls: what is what", "trace", [(c, calls) for c in pool]):
            traces[i] = trace
        kept: dict[Any, Screened] = {}
        for candidate, trace in zip(pool, traces, strict=True):
            if isinstance(trace, str):
                self.failures.setdefault(trace, []).append(f"{candidate.label} ({calls} calls)")
            elif (key := (trace.grid, trace.fingerprint)) in kept:
                kept[key].same.append(candidate.label)
            else:
                kept[key] = Screened(candidate, trace, [])
        return list(kept.values())

    def grid_trace(self, grid: str, calls: int) -> Trace | None:
        """Noise levels of a grid of table A, as our first-order solver visits them on Diffusers' integer clock."""
        options = {"schedule": grid, "timesteps": "integer"} if grid != "AYS" else {}
        trace = self.runner.local.trace(Ours(grid, "ddim", options, "timesteps" if grid == "AYS" else ""), calls)
        return None if isinstance(trace, str) else trace

    def same_grid(
        self, grid: str, calls: int, screened: dict[str, dict[int, list[Screened]]]
    ) -> tuple[Screened, Screened] | None:
        """Their best and our best solver on one grid, by the screening; None if a side has none."""
        trace = self.grid_trace(grid, calls)
        found = {s: [c for c in screened[s][calls] if trace and c.trace.grid == trace.grid] for s in screened}
        return (found["theirs"][0], found["ours"][0]) if all(found.values()) else None

    def score(self, chosen: Sequence[tuple[Screened, int]]) -> list[Entry]:
        """Measures of candidates at a number of calls each, on the held-out prompts. A run that fails is inf off."""
        jobs = [Job(s.candidate, calls, self.held_out, self.seeds, images=True) for s, calls in chosen]
        lost = [math.inf] * len(self.held_out) * len(self.seeds)
        entries = []
        for (s, calls), scores in zip(chosen, self.runner.scores("held-out prompts", jobs), strict=True):
            if "fails" in scores:
                self.failures.setdefault(scores["fails"], []).append(f"{s.candidate.label} ({calls} calls, held out)")
                scores = {"mse": lost, "psnr": [-v for v in lost]}
            measures = scores["mse"], scores["psnr"], scores.get("clip")
            entries.append(Entry(s.candidate.label, calls, s.error, *measures))
        return entries

    def questions(self) -> list[Question]:
        """Exact against published third order, and the float against the integer clock, on the same grids."""
        prompts = self.held_out[: self.args.question_prompts]
        if not prompts:
            return []
        seeds, asked = self.seeds[:2], list[tuple[tuple[str, str, int], Ours, Ours]]()
        for schedule in QUESTION_GRIDS:
            exact, shipped = (_ours(solver, schedule) for solver in ("dpmpp_3m", "dpmpp_3m_shipped"))
            asked += [(("third order exact / as shipped", schedule, k), exact, shipped) for k in QUESTION_STEPS]
            exactly, rounded = (_ours("dpmpp_2m", schedule, clock) for clock in ("float", "integer"))
            asked += [(("clock float / integer, DPM++ 2M", schedule, k), exactly, rounded) for k in self.args.steps]
        jobs = [Job(c, what[2], prompts, seeds) for what, *two in asked for c in two]
        scores = [s["mse"] for s in self.runner.scores("questions", jobs)]
        known = self.runner.local.reference(prompts, seeds, self.runner.setup.reference)
        pairs, errors = list(known.pairs), known.errors.tolist()
        found = zip(asked, scores[::2], scores[1::2], strict=True)
        return [Question(*what, a, b, pairs, errors) for (what, _, _), a, b in found]


def _ours(solver: str, schedule: str, clock: str = "float") -> Ours:
    return Ours(f"{solver} {schedule} {clock}", solver, {"schedule": schedule, "timesteps": clock})


if __name__ == "__main__":
    main()
