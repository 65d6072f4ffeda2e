"""Criteria by name, as the command line gives them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from diffaccel.pruning.calibration import Calibration
from diffaccel.pruning.criteria.activation import activation
from diffaccel.pruning.criteria.evenly_spaced import evenly_spaced
from diffaccel.pruning.criteria.flap import flap
from diffaccel.pruning.criteria.magnitude import magnitude
from diffaccel.pruning.criteria.random import random
from diffaccel.pruning.criteria.scores import Scores
from diffaccel.pruning.criteria.taylor import taylor
from diffaccel.pruning.groups import Group

CALIBRATED = ("taylor", "activation", "flap")  # they look at calls of the network
CRITERIA = (*CALIBRATED, "magnitude", "random", "evenly_spaced")


def score(
    criterion: str,
    model: nn.Module,
    groups: Sequence[Group],
    calibration: Calibration | None = None,
    *,
    seed: int = 0,
) -> Scores:
    """Scores of the units by the criterion of this name; higher = keep.

    Args:
        criterion: one of `CRITERIA`.
        model: the network.
        groups: its groups, in the order of the network.
        calibration: calls of the network; those in `CALIBRATED` need it, the others ignore it.
        seed: seed of `random` and of the projections of `taylor`.

    Raises:
        ValueError: if the name is not known, the calibration is missing, the network has only shapes (`meta` device)
            and the criterion needs numbers, or a score is not finite.
        TypeError: if the calibration is none.
    """
    if criterion in (*CALIBRATED, "magnitude") and any(weight.is_meta for weight in model.parameters()):
        raise ValueError(f"{criterion} looks at weights, and a network on the meta device has none; load it first")
    if criterion == "magnitude":
        return magnitude(model, groups)
    if criterion == "random":
        return random(model, groups, seed=seed)
    if criterion == "evenly_spaced":
        return evenly_spaced(model, groups)
    if criterion not in CALIBRATED:
        raise ValueError(f"unknown criterion {criterion!r}; use {', '.join(CRITERIA)}")
    if calibration is None:
        raise ValueError(f"{criterion} looks at calls of the network; give a calibration (`record`, `random_calls`)")
    if not isinstance(calibration, Calibration):
        told = type(calibration).__name__
        raise TypeError(f"calibration is what `record(pipe, prompts)` or `random_calls(model)` returns, not a {told}")
    if criterion == "taylor":
        return taylor(model, groups, calibration, seed=seed)
    return (activation if criterion == "activation" else flap)(model, groups, calibration)
