"""Every deterministic scheduler of diffaccel, with the interface of `diffusers_candidates.Candidate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers_candidates import ays

import diffaccel
from diffaccel.samplers.catalog import SCHEDULES
from diffaccel.samplers.plan import is_singlestep
from diffaccel.samplers.solvers import SOLVERS


@dataclass(frozen=True)
class Ours:
    """A scheduler of diffaccel, with the interface of `Candidate`."""

    label: str
    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    stochastic: bool = False

    def make(self, config: Mapping[str, Any]) -> Any:
        """Scheduler for a pipeline whose scheduler has `config`."""
        return diffaccel.scheduler(self.solver, dict(config), **self.options)

    def arguments(self, config: Mapping[str, Any], calls: int) -> dict[str, Any]:
        """Arguments of the pipeline that make exactly `calls` network calls: a step is a call, for all of ours."""
        return {self.table: ays(self.table, calls)} if self.table else {"num_inference_steps": calls}


SAME = ("euler", "heun")  # other names of ddim and deis_rho2heun
OTHER_NETWORKS = ("flow", "ays_sdxl", "ays_svd", "ays_deepfloyd")
# Members of the solver family that have no name of their own, by the options that ask for them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc bh1": ("unipc", {"solver_order": 2, "solver_type": "bh1"}),
    "dpmpp_2m exact": ("dpmpp_2m", {"solver_type": "heun"}),
}


def our_candidates() -> Iterator[Ours]:
    """Every deterministic solver of ours x schedule x start x end x clock, and on the AYS table."""
    named = {name: (name, {}) for name, rule in SOLVERS.items() if not rule.stochastic and name not in SAME}
    for (label, (solver, variant)), start in itertools.product((named | VARIANTS).items(), ("euler", "singlestep")):
        rule = SOLVERS[solver]
        if start == "singlestep" and (is_singlestep(rule) or not rule.can_correct):
            continue
        for schedule, final, clock in itertools.product(SCHEDULES, ("zero", "sigma_min"), ("float", "integer")):
            if schedule not in OTHER_NETWORKS and (clock == "float" or final == "zero"):
                options = variant | {"schedule": schedule, "final": final, "timesteps": clock, "start": start}
                yield Ours(f"{label} {start} {schedule} final={final} {clock}", solver, options)
        for table in ("timesteps", "sigmas"):
            yield Ours(f"{label} {start} AYS({table})", solver, variant | {"start": start}, table)
