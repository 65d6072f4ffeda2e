"""Latency of a network's parts by their width, measured where it runs: half of the MACs seldom take half the time."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from numpy.typing import NDArray
from torch import Tensor, nn

from diffaccel import cost
from diffaccel.pruning.costs.table import Costs
from diffaccel.pruning.gates import check_eager
from diffaccel.pruning.groups import Group
from diffaccel.pruning.structure import shrink

BATCH_SECONDS = 0.005  # parts are called for at least this long before the accelerator is drained
MOST_CALLS = 100

Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def latency_costs(
    model: nn.Module,
    groups: Sequence[Group],
    inputs: Mapping[str, Any],
    *,
    widths: int = 5,
    runs: int = 20,
    warmup: int = 3,
) -> Costs:
    """Seconds (medians) of one call `model(**inputs)` and of its parts, on the device and in the dtype of the model.

    One part of every kind and shape is measured alone, on inputs of the shapes that it has in the network: its module
    at some widths and without any unit, other widths are interpolated. Parts are called several times in a row, so that
    launching overlaps with computing as in the network. Where a narrower module is measured slower than a wider one,
    the curve is put between the highest one below it and the lowest one above it that never fall.

    `planned` of these costs is an estimate: time that passes between the modules stays with the network, and what
    compilers fuse across them is not seen. Measure what `cut` returns before you quote it.

    Args:
        model: the network, in eager mode and without gates.
        groups: groups of it.
        inputs: keyword arguments, on its device.
        widths: measured widths of a module with units, at least 2: all units, the fewest that `Group.step` leaves, and
            some between.
        runs: timed runs of each.
        warmup: runs before them.

    Raises:
        ValueError: if the network is on the meta device or compiled in place, or `widths` is below 2.
    """
    if widths < 2:
        raise ValueError(f"latency_costs needs widths >= 2 to interpolate, not {widths}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("a network on the meta device computes nothing that could be timed; move it with to_empty()")
    check_eager(model)
    total = cost.latency(lambda: model(**inputs), warmup=warmup, runs=runs).median
    calls = _record(model, {name for group in groups for name in group.modules}, inputs)
    parts = [(group, name) for group in groups for name in group.modules]
    keys = {(group.name, name): _key(model, group, name, calls[name]) for group, name in parts}
    first = {keys[group.name, name]: (group, name) for group, name in reversed(parts)}
    curves = {
        key: _curve(model, group, name, calls[name], widths, {"runs": runs, "warmup": warmup})
        for key, (group, name) in logging.tqdm(first.items(), desc="latency of parts")
    }
    kept = {group.name: np.sum([curves[keys[group.name, name]] for name in group.modules], axis=0) for group in groups}
    return Costs("latency", total, kept)


def _record(model: nn.Module, names: set[str], inputs: Mapping[str, Any]) -> dict[str, list[Call]]:
    """Arguments of every call of these modules in `model(**inputs)`; of calls that look alike those of the first."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    alike: dict[Any, Call] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name].append(alike.setdefault(_shapes((args, kwargs)), (args, kwargs)))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(record(name), with_kwargs=True) for name in names]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _shapes(values: Any) -> Any:
    """What the time of a call depends on, hashable."""
    if isinstance(values, Tensor):
        return tuple(values.shape), values.stride(), values.dtype
    if isinstance(values, Mapping):
        return tuple((name, _shapes(value)) for name, value in values.items())
    if isinstance(values, list | tuple):
        return tuple(_shapes(value) for value in values)
    return values if isinstance(values, int | float | str | None) else type(values)


def _key(model: nn.Module, group: Group, name: str, calls: list[Call]) -> Any:
    """Parts with the same key take the same time."""
    module = model.get_submodule(name)
    weights = tuple((key, tuple(weight.shape), weight.dtype) for key, weight in module.named_parameters())
    what = (group.kind, group.units, group.step) if group.sites else ()
    return what, repr(module), weights, _shapes(calls)


def _curve(
    model: nn.Module, group: Group, name: str, calls: list[Call], widths: int, timing: dict[str, int]
) -> NDArray[np.float64]:
    """Seconds of a module by the number of units it keeps, (units + 1,)."""
    module = model.get_submodule(name)
    if not group.sites:
        return np.array([0.0, _seconds(module, calls, timing)])
    counts = _counts(group, widths)
    seconds = np.array([_seconds(_shrunk(module, name, group, count), calls, timing) for count in counts])
    lower, upper = np.minimum.accumulate(seconds[::-1])[::-1], np.maximum.accumulate(seconds)
    return np.interp(np.arange(group.units + 1), counts, (lower + upper) / 2)


def _counts(group: Group, widths: int) -> list[int]:
    """Numbers of units kept that are measured: 0, and about `widths` from the fewest to all, in steps of the group."""
    steps = (group.units - 1) // group.step
    chosen = {round(i * steps / (widths - 1)) for i in range(widths)}
    return [0, *sorted(group.units - step * group.step for step in chosen)]


def _shrunk(module: nn.Module, name: str, group: Group, count: int) -> nn.Module:
    """The module with `count` units and weights of no meaning; the module itself if it keeps all."""
    if count == group.units:
        return module
    return shrink(copy.deepcopy(module), [group], {group.name: group.units - count}, name)


def _seconds(module: nn.Module, calls: list[Call], timing: dict[str, int]) -> float:
    """Seconds of all these calls of a module together."""

    def run() -> None:
        for args, kwargs in calls:
            module(*args, **kwargs)

    if not calls:
        return 0.0
    once = cost.latency(run, warmup=timing["warmup"], runs=1).median
    repeats = max(1, min(MOST_CALLS, math.ceil(BATCH_SECONDS / max(once, 1e-9))))

    def repeated() -> None:
        for _ in range(repeats):
            run()

    return cost.latency(repeated, warmup=0, runs=timing["runs"]).median / repeats
