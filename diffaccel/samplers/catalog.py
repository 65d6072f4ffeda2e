"""Names: solvers and schedules as people call them in Diffusers, A1111 and ComfyUI, and the factory that takes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from diffaccel.samplers import config as boundary
from diffaccel.samplers.exponential import ExponentialAdams
from diffaccel.samplers.grid import Final
from diffaccel.samplers.named import (
    ONE_SOLVER,
    DDIMSolverScheduler,
    DPMSolverScheduler,
    FlowEulerScheduler,
    UniPCScheduler,
)
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.solvers import SOLVERS
from diffaccel.samplers.spacing import SPACINGS

# One spacing is what a config key means for one Diffusers class, and is not asked for by name.
SCHEDULES = tuple(name for name in SPACINGS if name != "flow_linspace")

# For who does not choose: among the best at 4 to 10 calls with guidance (benchmarks/results/solvers_emoji-sd.md).
DEFAULT: dict[str, Any] = {"solver": "er_ode_1_corrected", "schedule": "beta", "final": "sigma_min"}

# Other programs' names, squeezed (see `_squeeze`), and what they are here. Schedule names may follow a solver's.
SOLVER_ALIASES = {
    "dpm++ 2m": "dpmpp_2m",
    "dpm++ 3m": "dpmpp_3m_shipped",  # these names mean what those programs run
    "dpm++ 2m sde": "dpmpp_2m_sde",
    "dpm++ 3m sde": "dpmpp_3m_sde_shipped",
    "dpmpp 2m sde gpu": "dpmpp_2m_sde",
    "dpmpp 3m sde gpu": "dpmpp_3m_sde_shipped",
    "uni pc": "unipc_3_bh1",
    "uni pc bh2": "unipc_3",
    "unipc 2": "unipc",
    "dpm++ 2s": "dpmpp_2s",
    "dpm++ 2s a": "dpmpp_2s_ancestral",
    "dpm++ 2s ancestral": "dpmpp_2s_ancestral",
    "dpmpp 2s a": "dpmpp_2s_ancestral",
    "kdpm2": "dpm_2s",
    "k euler": "euler",
    "k euler a": "euler_ancestral",
    "k heun": "heun",
    "k lms": "deis_rhoab3",
    "unipc bh1": "unipc_3_bh1",
    "unipc bh2": "unipc_3",
    "dpm++ sde": "seeds_2",  # the same rule, with the exact noise of a Brownian path
    "dpmpp sde": "seeds_2",
    "dpmpp sde gpu": "seeds_2",
    "dpm++ 2m sde heun": "res_2m_sde",
    "dpmpp 2m sde heun": "res_2m_sde",
    "dpmpp 2m sde heun gpu": "res_2m_sde",
    "dpm fast": "dpm_3s",
    "dpm2": "dpm_2s",  # stages at the geometric mean of the sigmas are stages at half of the step in log-SNR
    "dpm 2": "dpm_2s",
    "dpm2 a": "dpm_2s_ancestral",
    "dpm 2 ancestral": "dpm_2s_ancestral",
    "euler a": "euler_ancestral",
    "lms": "deis_rhoab3",
    "ipndm v": "deis_rhoab3",
    "deis": "deis_tab2",
    "res multistep": "res_2m",
    "er sde": "er_sde_3",
    "edm heun": "heun",
}
SCHEDULE_ALIASES = {
    "uniform": "normal",
    "simple": "trailing",
    "sgm uniform": "linspace",
    "ddim": "ddim_uniform",
    "lu": "logsnr",
    "log snr": "logsnr",
    "align your steps sd15": "ays_sd15",
    "align your steps sdxl": "ays_sdxl",
    "align your steps svd": "ays_svd",
    "gits": "gits_sd15",
    "align your steps gits": "gits_sd15",
    "polyexponential": "exponential",  # A1111's default of it
    "lu lambdas": "logsnr",
    "beta 57": "beta57",
}


def scheduler(
    solver: str,
    pipe_or_config: Any,
    *,
    schedule: str | None = None,
    timesteps: Literal["float", "integer"] = "float",
    final: Final = "zero",
    start: Literal["euler", "singlestep"] = "euler",
    strength: float = 1.0,
    **options: Any,
) -> SolverScheduler:
    """Scheduler for a pipeline, by the names of a solver and a schedule.

    `pipe.scheduler = diffaccel.scheduler("dpmpp_2m", pipe, schedule="logsnr")`

    Args:
        solver: a name from `diffaccel list`, or the A1111 or ComfyUI one ("DPM++ 2M Karras" names its schedule too). A
            name of the list always means what the list says: `dpmpp_3m_sde` is third order, "DPM++ 3M SDE" and
            ComfyUI's `dpmpp_3m_sde_gpu` the shipped form; `unipc` is of order 2, "uni_pc" ComfyUI's, order 3 with bh1.
        pipe_or_config: a pipeline, or its `pipe.scheduler.config`.
        schedule: a name from `diffaccel list`; None keeps what the config asks for.
        timesteps: `float` tells the network exact times, `integer` rounds them as Diffusers does.
        final: end at sigma = 0, or at the smallest sigma the network was trained on, whatever the config says;
            `corrector` makes the last call there and redoes the last step with it. Runs on given `sigmas` end at 0.
        start: `euler`, or `singlestep` for a start without a first-order step (deterministic solvers).
        strength: image-to-image: what the pipeline gets as `strength`, given here too, spreads its calls over the noise
            below that level. 1 leaves it to the pipeline, which cuts the grid of the whole range.
        options: config keys (`thresholding`, `shift`, ...) or fields of the solver (`eta`, ...).

    Raises:
        ValueError: for an unknown name, with the list of those known.
    """
    name, named_schedule = parse_solver(solver)
    config = getattr(getattr(pipe_or_config, "scheduler", None), "config", pipe_or_config)
    if not isinstance(config, Mapping):
        hint = "; pass its .config" if hasattr(config, "config") else ""
        raise TypeError(f"expected a pipeline or its scheduler's config, not {type(pipe_or_config).__name__}{hint}")
    flow = boundary.is_flow(config)
    chosen = parse_schedule(schedule) if schedule is not None else named_schedule
    if named_schedule is not None and chosen != named_schedule:
        raise ValueError(f"{solver!r} names schedule {named_schedule!r}, and schedule= another one, {schedule!r}")
    if final not in get_args(Final):
        raise ValueError(f"final must be {', '.join(get_args(Final))}, not {final!r}")
    if "solver_options" in options:
        raise ValueError("pass the solver's options by themselves, such as eta=0.5, not as solver_options=")
    cls, keys = _class_keys(name, flow)
    keys |= {"final_sigmas_type": final, "set_alpha_to_one": final != "sigma_min"}
    solver_options = keys.pop("solver_options", {})
    kept = (config.get("solver_options") or {}).get("schedule")
    if chosen is None and kept is not None:  # a config of ours
        solver_options["schedule"] = kept
    if chosen is not None:
        spacing = boundary.spacing_config(chosen, flow)
        solver_options |= spacing.pop("solver_options", {})
        keys |= spacing
    if timesteps != "float":
        solver_options["timesteps"] = timesteps
    if start != "euler":
        solver_options["start"] = start
    if strength != 1 or isinstance(strength, bool):
        solver_options["strength"] = strength
    accepted = cls._get_init_keys(cls)
    solver_options |= {k: v for k, v in options.items() if k not in accepted}
    keys |= {k: v for k, v in options.items() if k in accepted}
    return cls.from_config(config, **keys, solver_options=solver_options or None)


def parse_solver(name: str) -> tuple[str, str | None]:
    """Solver name of ours, and schedule name where the given name ends in one; raises `ValueError` if unknown."""
    squeezed = _squeeze(name)
    known = {_squeeze(n): n for n in SOLVERS} | SOLVER_ALIASES
    if squeezed in known:
        return known[squeezed], None
    for words in range(1, squeezed.count(" ") + 1):
        head, tail = squeezed.rsplit(" ", words)[0], " ".join(squeezed.rsplit(" ", words)[1:])
        if head in known and tail in _schedule_names():
            return known[head], _schedule_names()[tail]
    raise ValueError(
        f"unknown solver {name!r}; {_guess(squeezed, known)}use {', '.join(SOLVERS)}, or an A1111 or ComfyUI name such "
        "as 'DPM++ 2M Karras'"
    )


def parse_schedule(name: str) -> str:
    """Schedule name of ours for `name`; raises `ValueError` if unknown."""
    if _squeeze(name) not in _schedule_names():
        guess = _guess(_squeeze(name), _schedule_names())
        raise ValueError(f"unknown schedule {name!r}; {guess}use {', '.join(SCHEDULES)}")
    return _schedule_names()[_squeeze(name)]


def _schedule_names() -> dict[str, str]:
    return {_squeeze(n): n for n in SCHEDULES} | SCHEDULE_ALIASES


def _guess(squeezed: str, known: Mapping[str, str]) -> str:
    if squeezed in ("ays", "align your steps"):
        return "say which network's: ays_sd15, ays_sdxl, ays_svd or ays_deepfloyd; "
    close = difflib.get_close_matches(squeezed, known, n=1)
    return f"did you mean {known[close[0]]}? " if close else ""


def _squeeze(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"unknown name {name!r}; solvers and schedules are strings such as 'dpmpp_2m' and 'karras'")
    return re.sub(r"[\s_-]+", " ", re.sub(r"\+\+(?=\w)", "++ ", name.strip().lower()))


def _class_keys(name: str, flow: bool) -> tuple[type[SolverScheduler], dict[str, Any]]:
    """Class and config keys of solver `name`, in Diffusers' words wherever it has them."""
    rule = SOLVERS[name]
    if name in ("ddim", "euler", "ddpm"):
        options = {"solver_options": {"eta": 1.0}} if name == "ddpm" else {}
        return (FlowEulerScheduler if flow else DDIMSolverScheduler), options
    for cls in ONE_SOLVER:
        if cls._solver == name:
            return cls, {}
    if name.startswith("unipc") and name != "unipc_vary" and isinstance(rule, ExponentialAdams):
        kind = "bh1" if rule.second == "bh1" else "bh2"
        keys: dict[str, Any] = {"solver_order": rule.order, "solver_type": kind, "lower_order_final": True}
        return UniPCScheduler, keys | ({"solver_options": {"prediction": "epsilon"}} if rule.memory != "x0" else {})
    if name.startswith("dpm") and isinstance(rule, ExponentialAdams):
        keys = {"solver_order": rule.order, "solver_type": "midpoint", "lower_order_final": True}
        keys["algorithm_type"] = ("sde-" if rule.eta else "") + ("dpmsolver++" if rule.memory == "x0" else "dpmsolver")
        if rule.order == 3:  # the class takes the shipped form by default
            keys["solver_options"] = {"halve_curvature": rule.halve_curvature}
        return DPMSolverScheduler, keys
    return SolverScheduler, {"solver_options": {"solver": name}}
