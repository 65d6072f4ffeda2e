"""Noise after a step: go further down than asked, and come back up with fresh noise."""

from __future__ import annotations

import math
from dataclasses import replace

from diffaccel.samplers.row import Row
from diffaccel.samplers.solver import Memory, Node


def ancestral(start: Node, end: Node, eta: float) -> Node:
    """Level to step down to, so that noise lifts the sample to `end`: k-diffusion's `get_ancestral_step`.

    In sigma / alpha on every path: sigma_up = min(end, eta * end * sqrt(1 - (end / start)^2)).
    """
    up = min(1.0, eta * math.sqrt(-math.expm1(2 * (start.lam - end.lam))))
    # All noise replaced: land as close to x0 as floats allow.
    return Node(end.lam - 0.5 * math.log(max(1 - up**2, 1e-16)), end.schedule)


def renoised(row: Row, landed: Node, end: Node, memory: Memory, s_noise: float = 1.0) -> Row:
    """Continue `row`, which lands at `landed`, with noise up to `end`."""
    if math.isinf(landed.lam) or landed.lam <= end.lam:
        return row
    # x = alpha * y at both levels, and the row is in units of its frame.
    scale = end.alpha / landed.alpha * landed.frame(memory) / end.frame(memory)
    added = math.sqrt(end.ve_sigma**2 - landed.ve_sigma**2) * end.alpha / end.frame(memory)
    noise = math.hypot(row.noise * scale, s_noise * added)
    return replace(
        row,
        x=row.x * scale,
        m=tuple(scale * w for w in row.m),
        noise=noise,
        x0=row.x0 * scale,
        anchor=row.anchor * scale,
    )
