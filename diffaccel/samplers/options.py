"""`solver_options`, the one config key of ours: checked, and put into the solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from diffaccel.samplers.dual_fast import DualFast
from diffaccel.samplers.plan import is_singlestep
from diffaccel.samplers.request import check_strength
from diffaccel.samplers.solver import Multistep, Singlestep

# Keys that are not fields of the solver.
OWN = ("solver", "schedule", "timesteps", "start", "strength", "dual_fast")


def solver_with(solver: Multistep | Singlestep, options: Mapping[str, Any]) -> Multistep | Singlestep:
    """`solver` with its fields changed by `options`; raises `ValueError` for an unknown key or value."""
    for key, allowed in (("timesteps", ("float", "integer")), ("start", ("euler", "singlestep"))):
        if options.get(key, allowed[0]) not in allowed:
            raise ValueError(f"solver_options[{key!r}] is {options[key]!r}; use {' or '.join(allowed)}")
    check_strength(options.get("strength", 1.0))
    rule: Any = solver
    known = {f.name: getattr(rule, f.name) for f in fields(rule)}
    own = {key: value for key, value in options.items() if key not in OWN}
    if unknown := sorted(own.keys() - known.keys()):
        raise ValueError(f"unknown solver option {unknown[0]!r}; use {', '.join((*OWN, *known))}")
    for key, value in {"dual_fast": options.get("dual_fast", 0.0), **own}.items():
        _check_kind(key, value, known.get(key, 0.0))
    solver = replace(rule, **own)
    if not options.get("dual_fast"):
        return solver
    if is_singlestep(solver):
        raise ValueError("dual_fast mixes in an earlier prediction; use a multistep solver, which keeps them")
    return DualFast(solver, options["dual_fast"])


def _check_kind(key: str, value: Any, like: Any) -> None:
    """Refuse a value of another kind than the solver's own: True for a number, "3" for 3."""
    kinds: dict[type, tuple[Any, str]] = {
        bool: (bool, "True or False"),
        str: (str, "a name"),
        int: (int, "a whole number"),
    }
    kind, what = kinds.get(type(like), ((int, float), "a number"))
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"solver option {key!r} must be {what}, not {value!r}")
