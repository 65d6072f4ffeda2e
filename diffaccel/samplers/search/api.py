"""`diffaccel.search`: one call for every method, judged on prompts and seeds that none of them saw."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from diffaccel.eval.fidelity import paired_interval
from diffaccel.pruning.calibration import still
from diffaccel.samplers.grid import Final, time_grid
from diffaccel.samplers.plan import is_singlestep
from diffaccel.samplers.schedule import NoiseSchedule
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.search.pipeline import problem_of
from diffaccel.samplers.search.problem import Problem
from diffaccel.samplers.search.recipe import Entry, Recipe, network_facts
from diffaccel.samplers.search.reference import Trajectory, reference
from diffaccel.samplers.search.rollout import errors
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.tabulate import Found, tabulate

Method = Literal["auto", "dc", "ays", "usf", "iia", "gits", "autodiffusion"]
METHODS: tuple[Method, ...] = ("auto", "dc", "ays", "usf", "iia", "gits", "autodiffusion")
# Solver and schedule that methods work on which do not choose their own; beta is not for all paths the best.
BASE = {"dc": ("unipc", "linspace", "sigma_min"), "iia": ("ddim", "beta", "sigma_min")}
SOLVER = {"ays": "dpmpp_2m", "gits": "dpmpp_2m", "autodiffusion": "dpmpp_2m"}
DEFAULT = ("er_ode_1_corrected", "beta", "sigma_min")  # the package's own, which a recipe is compared to
HELD_OUT_SEED = 1_000_003  # apart from the seeds that are fitted


def search(
    pipe: Any,
    method: Method = "auto",
    *,
    prompts: Sequence[Any],
    steps: int | Sequence[int] = 5,
    guidance_scale: float | None = None,
    pairs: int = 32,
    solver: str | None = None,
    schedule: str | None = None,
    final: Final | None = None,
    seed: int = 0,
    batch: int = 32,
    reference_steps: int = 100,
    cache: str | Path | None = None,
    progress: bool = True,
    call: dict[str, Any] | None = None,
    **options: Any,
) -> Recipe:
    """Search a sampler for a model that somebody already has.

    Every fourth prompt is held out: no method sees it, and the recipe says how it does there, with seeds of their own,
    against the package's default and against what the method started from, on equal network calls. What loses to the
    default on the held-out pairs is returned all the same, and says so: `entry.measured["default"]["ratio"]`,
    the median over pairs with its interval, where two prompts or more are held out.

    Args:
        pipe: a text-to-image or class-conditional pipeline with one network.
        method: `auto` learns nodes, times and weights together; `dc` DC-Solver's ratios; `ays` Align Your Steps; `usf`
            per-step solver decisions; `iia` per-step least squares; `gits` nodes by dynamic programming;
            `autodiffusion` steps and skipped layers.
        prompts: at least four texts (or class numbers), like those that will be drawn.
        steps: network calls, one number or several.
        guidance_scale: that will be used; None: the pipeline's default. A recipe is for one.
        pairs: prompt and noise pairs that are fitted, at least; the prompts get as many seeds as that takes.
        solver: a name from `diffaccel list`, for methods that do not choose it.
        schedule: likewise.
        final: end of the run, likewise.
        seed: of the noise, and of what methods draw.
        batch: pairs that the network sees at once.
        reference_steps: calls of the converged reference of each pair.
        cache: folder for references and for the state of long searches, so that an interrupted one goes on.
        progress: show progress bars.
        call: further arguments of every call of the pipeline, such as `height`.
        options: of the method, see its function.

    Returns:
        A recipe with one entry for each number of steps.

    Raises:
        ValueError: for an unknown method or option, or too few prompts.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use {', '.join(METHODS)}")
    if isinstance(prompts, str) or len(prompts) < 4 or len(set(prompts)) < len(prompts):
        raise ValueError(
            "a search fits on some prompts and is judged on others; give a list of four different ones or more"
        )
    function = _function(method, options)
    scale = _guidance(pipe) if guidance_scale is None else float(guidance_scale)
    wanted = [steps] if isinstance(steps, int) else sorted(set(steps))
    if not wanted or min(wanted) < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    if pairs < 1:
        raise ValueError(f"pairs must be 1 or more, not {pairs}")
    noise = SolverScheduler.from_config(pipe.scheduler.config).schedule
    bases = {n: _base(method, noise, n, solver, schedule, final) for n in wanted}
    held = list(prompts[3::4])
    fit = [prompt for i, prompt in enumerate(prompts) if i % 4 != 3]
    networks = network_facts(pipe)
    with still(_network(pipe)):
        fitting, fitted = _solved(pipe, fit, pairs, seed, scale, batch, reference_steps, cache, progress, call)
        judging, judged = _solved(
            pipe, held, max(16, pairs // 2), seed + HELD_OUT_SEED, scale, batch, reference_steps, cache, progress, call
        )
        entries = []
        for n, base in bases.items():
            given = _given(function, fitting, base, n, seed, cache, progress) | options
            begin, before = time.perf_counter(), fitting.spent
            found = function(fitting, fitted, n, **given)
            facts = {"seconds": round(time.perf_counter() - begin, 1), "samples_seen": fitting.spent - before}
            measured = _measured(judging, judged, found, base, held, n) | facts
            entries.append(Entry.of(found.table, method, scale, measured=measured, notes=found.notes))
    return Recipe(networks, tuple(entries))


def _function(method: str, options: dict[str, Any]) -> Callable[..., Found]:
    function = getattr(import_module(f"diffaccel.samplers.search.{method}"), method)
    known = set(inspect.signature(function).parameters) - {
        "problem",
        "trajectory",
        "steps",
        "solver",
        "grid",
        "network",
    }
    for name in options:
        if name not in known:
            raise ValueError(f"{method} has no option {name!r}; it has {', '.join(sorted(known))}")
    return function


def _given(
    function: Callable[..., Found], problem: Problem, base: _Base, n: int, seed: int, cache: Any, progress: bool
) -> dict[str, Any]:
    """What a method's function asks for, of what there is."""
    known = inspect.signature(function).parameters
    have = {"solver": base.solver, "grid": base.grid, "seed": seed, "progress": progress, "network": problem.network}
    have["cache"] = Path(cache) / f"{function.__name__}-{n}-{problem.key}" if cache is not None else None
    return {name: value for name, value in have.items() if name in known}


class _Base:
    """What a method starts from, and what its recipe is compared to."""

    def __init__(self, noise: NoiseSchedule, n: int, solver: str, schedule: str, final: Final) -> None:
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; use {', '.join(SOLVERS)}")
        self.name = f"{solver}, {schedule}, {final}"
        self.solver = SOLVERS[solver]
        if is_singlestep(self.solver) or self.solver.stochastic:
            raise ValueError(f"searches are for multistep solvers without noise, and {solver!r} is none")
        if final not in ("zero", "sigma_min"):
            raise ValueError(f"searched samplers end at 'zero' or 'sigma_min', not {final!r}")
        self.grid = time_grid(noise, n, schedule, final=final)
        self.table = tabulate(noise, self.grid, self.solver)


def _base(
    method: str, noise: NoiseSchedule, n: int, solver: str | None, schedule: str | None, final: Final | None
) -> _Base:
    default = BASE.get(method, (SOLVER.get(method, DEFAULT[0]), *DEFAULT[1:]))
    return _Base(noise, n, solver or default[0], schedule or default[1], final or default[2])  # pyright: ignore


def _solved(
    pipe: Any,
    prompts: Sequence[Any],
    pairs: int,
    seed: int,
    scale: float,
    batch: int,
    steps: int,
    cache: Any,
    progress: bool,
    call: dict[str, Any] | None,
) -> tuple[Problem, Trajectory]:
    seeds = range(seed, seed + -(-pairs // len(prompts)))
    problem = problem_of(pipe, prompts, seeds, scale, batch=batch, **(call or {}))
    return problem, reference(problem, steps, cache=cache, progress=progress)


def _measured(
    problem: Problem, trajectory: Trajectory, found: Found, base: _Base, prompts: Sequence[Any], n: int
) -> dict[str, Any]:
    """Held-out errors: the recipe's, and those of two fixed samplers with as many calls."""
    default = _Base(problem.schedule, n, *DEFAULT)  # pyright: ignore[reportArgumentType]
    ours = errors(problem, found.table, trajectory, found.notes.get("skips"))
    out: dict[str, Any] = {"pairs": len(problem), "prompts": len(prompts), "latent_mse": _median(ours)}
    owners = [prompt for prompt in prompts for _ in range(len(problem) // len(prompts))]
    for key, other in {"start": base, "default": default}.items():
        theirs = errors(problem, other.table, trajectory)
        out[key] = {"sampler": other.name, "latent_mse": _median(theirs)}
        if len(prompts) > 1:
            interval = paired_interval(ours.numpy(), theirs.numpy(), owners)
            out[key]["ratio"] = [round(float(v), 4) for v in (interval.low, interval.median, interval.high)]
    return out


def _median(values: torch.Tensor) -> float:
    return float(f"{values.median().item():.6g}")


def _guidance(pipe: Any) -> float:
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return float(default.default) if default is not None and isinstance(default.default, int | float) else 1.0


def _network(pipe: Any) -> torch.nn.Module:
    from diffaccel.cost import denoisers

    return next(iter(denoisers(pipe).values()))
