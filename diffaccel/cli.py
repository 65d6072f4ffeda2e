"""The command line: `diffaccel demo`, `sample`, `eval`, `prune`, `search`, `edit-demo` and `list`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; bad input is answered with one sentence, not a traceback."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("diffaccel: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"diffaccel: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


def _parser() -> argparse.ArgumentParser:
    from diffaccel import __version__
    from diffaccel.eval.command_line import add_eval
    from diffaccel.kernels.command_line import add_edit_demo
    from diffaccel.pruning.command_line import add_prune
    from diffaccel.samplers.search.command_line import add_search

    parser = argparse.ArgumentParser(prog="diffaccel", description="Fast Diffusers pipelines, measured.")
    parser.add_argument("--version", action="version", version=f"diffaccel {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="compare samplers on the emoji model that ships with the package")
    demo.add_argument("--prompt", action="append", help="caption; may be given several times (default: eight captions)")
    demo.add_argument("--steps", type=int, default=8, help="network calls of every method (default: 8)")
    demo.add_argument("--guidance-scale", type=float, default=4.0, help="classifier-free guidance (default: 4)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    demo.add_argument("--output", type=Path, default=Path("diffaccel-demo"), help="folder for grid.png and demo.json")
    demo.set_defaults(run=_demo)

    sample = commands.add_parser("sample", help="make pictures with any local or hub model")
    sample.add_argument("model", help="a zoo name (emoji-sd), a folder, or a hub id")
    sample.add_argument("--prompt", action="append", required=True, help="text; may be given several times")
    sample.add_argument("--scheduler", help="a name from `diffaccel list` (default: what measured best, see the docs)")
    sample.add_argument("--schedule", help="a name from `diffaccel list` (default: what the model's config asks for)")
    ends = ("zero", "sigma_min", "corrector")
    sample.add_argument("--final", choices=ends, default="zero", help="end of the run (default: zero)")
    sample.add_argument("--recipe", type=Path, help="JSON of `diffaccel search`, instead of a scheduler and schedule")
    sample.add_argument("--steps", type=int, help="network calls (default: 10; of a recipe: its own)")
    guidance = "classifier-free guidance (default: the pipeline's; of a recipe: its own)"
    sample.add_argument("--guidance-scale", type=float, help=guidance)
    sample.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next ones count up")
    sample.add_argument("--device", help="cpu, cuda, mps (default: what there is)")
    sample.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32 on the CPU")
    sample.add_argument("--output", type=Path, default=Path("diffaccel-samples"), help="folder for the pictures")
    sample.set_defaults(run=_sample)

    add_eval(commands)
    add_prune(commands)
    add_search(commands)
    add_edit_demo(commands)

    names = commands.add_parser("list", help="names of solvers, schedules and their aliases")
    names.set_defaults(run=_list)
    return parser


def _demo(args: argparse.Namespace) -> None:
    from diffaccel.demo import run_demo

    run_demo(args.prompt, args.steps, args.guidance_scale, args.seed, args.output)


def _sample(args: argparse.Namespace) -> None:
    from diffaccel.sample import sample

    paths = sample(
        args.model,
        args.prompt,
        scheduler=args.scheduler,
        schedule=args.schedule,
        final=args.final,
        recipe=args.recipe,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        output=args.output,
    )
    for path in paths:
        print(path)


def _list(args: argparse.Namespace) -> None:
    from diffaccel.samplers.catalog import SCHEDULE_ALIASES, SCHEDULES, SOLVER_ALIASES
    from diffaccel.samplers.plan import is_singlestep
    from diffaccel.samplers.solvers import SOLVERS, SOURCES

    print("solvers")
    for name, solver in SOLVERS.items():
        kind = "SDE" if solver.stochastic else "ODE"
        calls = f"{solver.stages} calls a step" if is_singlestep(solver) and solver.stages > 1 else "1 call a step"
        aliases = [alias for alias, target in SOLVER_ALIASES.items() if target == name]
        what = f"{kind}, order {solver.convergence_order}, {calls}, {SOURCES[name]}"
        print(f"  {name:22} {what}{_also(aliases)}")
    print("schedules")
    for name in SCHEDULES:
        print(f"  {name:22} {SCHEDULE_NOTES[name]}{_also([a for a, t in SCHEDULE_ALIASES.items() if t == name])}")
    print("Upper and lower case, spaces, _ and - do not matter; 'DPM++ 2M Karras' names a solver and its schedule.")


SCHEDULE_NOTES = {
    "linspace": "even timesteps, the last one left out",
    "leading": "even timesteps from the clean end",
    "ddim_uniform": "even timesteps from 0, as DDIM",
    "normal": "even timesteps, both ends",
    "trailing": "even timesteps from the noisy end",
    "beta": "Beta(0.6, 0.6) quantiles of the timesteps",
    "beta57": "Beta(0.5, 0.7) quantiles of the timesteps",
    "quadratic": "timesteps even in their square root",
    "karras": "EDM's rho = 7",
    "exponential": "even log sigma",
    "kl_optimal": "even arctan of sigma",
    "linear_quadratic": "half of the calls on the first 2.5 % of the noise (Mochi, LTX)",
    "bong_tangent": "two arctangents that meet halfway down",
    "gradient_estimation": "even log sigma to T / n, then a long last step",
    "ays_sd15": "Align Your Steps, networks like Stable Diffusion 1.5",
    "ays_sdxl": "Align Your Steps, networks like SDXL",
    "ays_svd": "Align Your Steps, Stable Video Diffusion",
    "ays_deepfloyd": "Align Your Steps, DeepFloyd IF stage 1",
    "gits_sd15": "GITS, networks like Stable Diffusion 1.5",
    "logsnr": "even log signal-to-noise ratio",
    "flow": "flow-matching models: even sigma, shifted",
}


def _also(aliases: list[str]) -> str:
    return f"; also {', '.join(aliases)}" if aliases else ""
