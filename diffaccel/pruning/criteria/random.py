"""Random scores: what every criterion has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from torch import nn

from diffaccel.pruning.criteria.scores import Scores
from diffaccel.pruning.groups import Group


def random(model: nn.Module, groups: Sequence[Group], *, seed: int = 0) -> Scores:
    """Uniform in [0, 1); a group's scores depend on its name and the seed alone, not on which others there are."""
    return {
        group.name: np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.units)
        for group in groups
    }
