"""Early exit: fewer layers where fewer are needed, by a schedule over the noise level (ASE, arXiv:2408.05927)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from diffaccel.cost import denoisers
from diffaccel.samplers.policy.attach import Handle, attach
from diffaccel.samplers.policy.exits.depth import layers, shallow
from diffaccel.samplers.policy.exits.linear import LinearExit
from diffaccel.samplers.policy.exits.schedule import DepthSchedule


def early_exit(
    pipe: Any,
    depths: Sequence[int] | DepthSchedule,
    *,
    maps: dict[tuple[int, int], LinearExit] | None = None,
) -> Handle:
    """Let the network of a pipeline leave early at some noise levels: `handle = diffaccel.early_exit(pipe, depths)`.

    Args:
        pipe: a pipeline with a DiT, PixArt, SD3, Flux or U-Net.
        depths: layers that are computed in each of equal parts of the training time, from data to noise: blocks of a
            transformer, levels of a U-Net. `[8, 8, 8, 4]` computes 4 blocks of 8 above timestep 750.
        maps: affine maps that stand for the skipped layers, by (depth, part of time), from `fit_exits`: without them
            the network must have been trained for its exits (`examples/train_early_exit.py`).

    Returns:
        A handle: `handle.report()`, `handle.compile()`, `handle.remove()`.

    Raises:
        TypeError: for a network of another class.
        ValueError: for a depth that there is not, a missing map, or a schedule that never leaves early.
    """
    model: Any = next(iter(denoisers(pipe).values()))
    whole = layers(model)
    time = pipe.scheduler.config.get("num_train_timesteps", 1000)
    schedule = depths if isinstance(depths, DepthSchedule) else DepthSchedule(tuple(depths), whole, time)
    if schedule.layers != whole:
        raise ValueError(
            f"the schedule is for a network of depth {schedule.layers}, this {type(model).__name__} has {whole}"
        )
    if not schedule.exits():
        raise ValueError(f"this schedule always computes all {whole} layers; give a depth below {whole} somewhere")
    if schedule.mapped and maps is None:
        raise ValueError(
            "this schedule is for fitted exits; write early_exit(pipe, fitted.schedule(...), maps=fitted.maps)"
        )
    if maps is not None and (missing := [key for key in schedule.exits() if key not in maps]):
        raise ValueError(f"there is no map for depth {missing[0][0]} in part {missing[0][1]} of time; fit it too")
    schedule = replace(schedule, mapped=maps is not None)
    variants = {}
    for depth, part in schedule.exits():
        chosen = maps[depth, part] if maps is not None else None
        shallow(model, depth, chosen)  # what cannot be left at this depth says so now
        variants[schedule.name(part)] = partial(shallow, depth=depth, exit_map=chosen)
    return attach(pipe, schedule, variants)
