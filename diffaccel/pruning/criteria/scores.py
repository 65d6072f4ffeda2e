"""What criteria return, and what they share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffaccel.pruning.groups import Site

Scores = dict[str, NDArray[np.float64]]  # group name -> (units,), higher = keep


def per_unit(values: Tensor, site: Site, units: int) -> NDArray[np.float64]:
    """Sums over the features of each unit: (features of the layer,) -> (units,)."""
    total = np.zeros(units)
    everything = values.double().cpu().numpy()
    for start in site.starts:
        total += everything[start : start + units * site.size].reshape(units, site.size).sum(1)
    return total


def check(scores: Scores) -> Scores:
    """`scores`, if they are numbers.

    Raises:
        ValueError: naming a group whose scores are not finite; half precision that overflows is the usual cause.
    """
    if bad := [name for name, values in scores.items() if not np.isfinite(values).all()]:
        raise ValueError(f"the scores of {bad[0]} are not finite; score the network in float32 or bfloat16")
    return scores
