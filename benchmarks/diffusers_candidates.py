"""Every Diffusers scheduler x its built-in grids, end points and solver options, counted in network calls.

For networks that predict epsilon (or v) on a variance-preserving path, Stable Diffusion's among them. A candidate is
data: a class name, the config keys that are set, and the AYS table where one is used. Several are one method under
several names; `dry_run` tells which.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers import AysSchedules

SPACINGS = ("linspace", "leading", "trailing")
SIGMAS = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}
FINALS = ("zero", "sigma_min")
# Their sigma spacings run between the ends of what the index spacing picked; those of other classes span the table.
RESPACE_SPACED = (
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)
# Not for this kind of network, and no candidates: they run, but on another path or for a network trained otherwise.
NOT_USABLE = {
    "EDMEulerScheduler": "EDM preconditioning",
    "EDMDPMSolverMultistepScheduler": "EDM preconditioning",
    "CosineDPMSolverMultistepScheduler": "its own EDM schedule (Stable Audio)",
    "IPNDMScheduler": "its own trigonometric schedule (Dance Diffusion)",
    "ScoreSdeVeScheduler": "a VE path with predictor and corrector calls",
    "CMStochasticIterativeScheduler": "consistency models",
    "LCMScheduler": "consistency-distilled networks",
    "UnCLIPScheduler": "its own cosine schedule (unCLIP)",
    "RePaintScheduler": "inpainting only",
    "FlowMatchEulerDiscreteScheduler": "rectified flow",
    "FlowMatchHeunDiscreteScheduler": "rectified flow",
    "FlowMatchLCMScheduler": "rectified flow",
}


class DoesNotFitError(ValueError):
    """The candidate cannot make exactly this many calls; the message says why."""


def no_noise(t: Any) -> float:
    """`tau_func` that makes SASolver deterministic."""
    return 0.0


@dataclass(frozen=True)
class Candidate:
    """A Diffusers scheduler with its options.

    Attributes:
        label: name in tables, unique.
        scheduler: name of the Diffusers class.
        options: config keys that differ from the pipeline's own.
        table: `timesteps` or `sigmas` if the grid is the AYS table, else "".
        stochastic: whether it adds noise: then it samples the SDE and has no place near the ODE's solution.
    """

    label: str
    scheduler: str
    options: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    stochastic: bool = False

    def make(self, config: Mapping[str, Any]) -> Any:
        """Scheduler for a pipeline whose scheduler has `config`."""
        return getattr(diffusers, self.scheduler).from_config(dict(config), **self.options)

    def arguments(self, config: Mapping[str, Any], calls: int) -> dict[str, Any]:
        """Arguments of the pipeline, or of `set_timesteps`, that make exactly `calls` network calls.

        Raises:
            DoesNotFitError: if there are none.
            Exception: whatever the scheduler raises.
        """
        counts = {}
        for steps in range(calls, 0, -1):
            arguments = {self.table: ays(self.table, steps)} if self.table else {"num_inference_steps": steps}
            scheduler = self.make(config)
            try:
                scheduler.set_timesteps(**arguments)
            except Exception:
                if steps == calls:
                    raise
                break  # too few steps for it: PNDM's Runge-Kutta start, for one
            counts[steps] = len(scheduler.timesteps)
            if counts[steps] == calls:
                return arguments
            if counts[steps] < calls:
                break
        seen = ", ".join(f"{n} steps make {c} calls" for n, c in sorted(counts.items())[:2])
        raise DoesNotFitError(f"no number of steps makes {calls} calls ({seen})")


def candidates() -> Iterator[Candidate]:
    """Every candidate, one method under several names included."""
    for name, options, stochastic, tables in _families():
        for grid, keys in _grids(name):
            for choice in _product(options):
                label = " ".join([name.removesuffix("Scheduler"), grid, *map(_word, choice.items())])
                yield Candidate(label, name, keys | choice, stochastic=stochastic or _is_sde(choice))
        for table, choice in itertools.product(tables, _product(options)):
            label = " ".join([name.removesuffix("Scheduler"), f"AYS({table})", *map(_word, choice.items())])
            keys = {"timestep_spacing": "linspace"} | choice
            yield Candidate(label, name, keys, table, stochastic or _is_sde(choice))


def _families() -> Iterator[tuple[str, dict[str, list[Any]], bool, tuple[str, ...]]]:
    """(class, values of its options, whether it adds noise, custom grids its set_timesteps takes)."""
    final = {"final_sigmas_type": list(FINALS)}
    first = {"set_alpha_to_one": [True, False]}
    yield "DDIMScheduler", first, False, ()
    yield "TCDScheduler", first, False, ("timesteps",)
    yield "PNDMScheduler", first | {"skip_prk_steps": [True, False]}, False, ()
    yield "LMSDiscreteScheduler", {}, False, ()
    yield "EulerDiscreteScheduler", final, False, ("timesteps", "sigmas")
    yield "HeunDiscreteScheduler", {}, False, ("timesteps",)
    yield "KDPM2DiscreteScheduler", {}, False, ()
    dpm = {"algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"], "solver_type": ["midpoint", "heun"]}
    orders = {"solver_order": [1, 2, 3]}
    dpm |= orders | final | {"lower_order_final": [True, False]}  # euler_at_final changes nothing below 15 steps
    yield "DPMSolverMultistepScheduler", dpm, False, ("timesteps",)
    yield "DPMSolverSinglestepScheduler", dpm, False, ("timesteps",)
    yield "DEISMultistepScheduler", orders, False, ()
    yield "UniPCMultistepScheduler", orders | {"solver_type": ["bh1", "bh2"]} | final, False, ("sigmas",)
    adams = {"predictor_order": [1, 2, 3], "corrector_order": [1, 2, 3]}
    yield "SASolverScheduler", {"tau_func": [no_noise]} | adams, False, ()
    for name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        yield name, {}, True, ("timesteps",) if name == "DDPMScheduler" else ()
    yield "DPMSolverSDEScheduler", {}, True, ()


def _grids(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Built-in grids of a class: index spacings, then sigma spacings, on each index spacing that they depend on."""
    own = inspect.signature(getattr(diffusers, name).__init__).parameters.keys()
    for spacing in SPACINGS:
        yield spacing, {"timestep_spacing": spacing}
    for sigma, keys in SIGMAS.items():
        if own >= keys.keys():
            for spacing in SPACINGS if name in RESPACE_SPACED else SPACINGS[:1]:
                label = f"{sigma}/{spacing}" if name in RESPACE_SPACED else sigma
                yield label, keys | {"timestep_spacing": spacing}
    if "use_lu_lambdas" in own:
        yield "lu", {"use_lu_lambdas": True, "timestep_spacing": "linspace"}


def _product(options: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _word(item: tuple[str, Any]) -> str:
    key, value = item
    short = {"solver_order": "order", "final_sigmas_type": "final", "predictor_order": "p", "corrector_order": "c"}
    if key == "tau_func":
        return "tau=0"
    return f"{short[key]}={value}" if key in short else str(value) if isinstance(value, str) else f"{key}={value}"


def _is_sde(options: Mapping[str, Any]) -> bool:
    return str(options.get("algorithm_type", "")).startswith("sde")


def ays(kind: str, calls: int) -> list[float]:
    """Stable Diffusion's AYS table (arXiv:2404.14507) for `calls` calls.

    It has 10; for other counts it is interpolated in log sigma (or in the timestep), as its authors say.
    """
    table = np.array(AysSchedules[f"StableDiffusion{kind.capitalize()}"], dtype=np.float64)
    at = np.linspace(0, 1, calls)
    if kind == "timesteps":
        return [int(t) for t in np.interp(at, np.linspace(0, 1, len(table)), table).round()]
    logs = np.log(table[:-1])  # the last sigma is 0
    return [*np.exp(np.interp(at, np.linspace(0, 1, len(logs)), logs)).tolist(), 0.0]
