"""Costs that are sums over layers: multiply-accumulates and parameters. Every unit of a group costs the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from diffaccel import cost
from diffaccel.meta import meta_copy, to_meta
from diffaccel.pruning.costs.table import Costs
from diffaccel.pruning.groups import Group, Site


def macs_costs(model: nn.Module, groups: Sequence[Group], inputs: Mapping[str, Any]) -> Costs:
    """Multiply-accumulates of one call `model(**inputs)`, counted by `diffaccel.cost` on shapes alone.

    A unit takes the share of its features in every layer of its sites, and a head its share of softmax(Q K^T) V.
    `planned` is what the network has after the cut, to the last one: no layer has units of one group in its rows and of
    another in its columns. The exception is SD3 without its last block: there the new last block is simplified too.

    Raises:
        ValueError: if a group's module is not in the network.
    """
    _check(model, groups)
    macs = cost.macs_by_module(meta_copy(model), **to_meta(dict(inputs)))

    def layer(site: Site, share: float) -> float:
        return macs.get(site.module, 0) * share

    def fixed(group: Group) -> int:
        return 0

    def whole(group: Group) -> int:
        return sum(macs.get(name, 0) for name in group.modules)

    kept = {group.name: _kept(model, group, layer, fixed, whole) for group in groups}
    for group in groups:
        if group.attention:
            kept[group.name] += _own(model, macs, group.attention) * np.arange(group.units + 1) / group.units
    return Costs("macs", macs[""], kept)


def parameter_costs(model: nn.Module, groups: Sequence[Group]) -> Costs:
    """Parameters; one that several layers share is counted once, and is saved only when all of them go.

    Norms in front of the units (of queries and keys, the first of a ResNet) stay up to the last unit and go with it.

    Raises:
        ValueError: if a group's module is not in the network.
    """
    _check(model, groups)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    numbers = {id(parameter): parameter.numel() for parameter in model.parameters()}

    def inside(*modules: str) -> int:
        prefixes = tuple(name + "." for name in modules)
        return sum(numbers[key] for key, names in owners.items() if all(name.startswith(prefixes) for name in names))

    def layer(site: Site, share: float) -> float:
        found: Any = model.get_submodule(site.module)
        bias = 0 if site.side == "in" or found.bias is None else found.bias.numel()
        return (found.weight.numel() + bias) * share

    def fixed(group: Group) -> int:
        if group.kind == "heads":
            layers = {site.module for site in group.sites}
            return inside(group.attention) - inside(*(name for name in layers if name.startswith(group.attention)))
        return inside(f"{group.modules[0]}.norm1") if group.kind in ("channels", "resnet") else 0

    def whole(group: Group) -> int:
        return inside(*group.modules)

    kept = {group.name: _kept(model, group, layer, fixed, whole) for group in groups}
    return Costs("parameters", cost.parameters(model), kept)


def _kept(
    model: nn.Module,
    group: Group,
    layer: Callable[[Site, float], float],
    fixed: Callable[[Group], int],
    whole: Callable[[Group], int],
) -> NDArray[np.float64]:
    """Cost by number of units kept: what `layer` gives for the share of each site, and `fixed` as long as one is left.

    Groups without sites go with their modules: `whole`.
    """
    if not group.sites:
        return np.array([0.0, whole(group)])
    units = sum(layer(site, _share(model, site, group.units)) for site in group.sites)
    kept = fixed(group) + units * np.arange(group.units + 1) / group.units
    kept[0] = 0
    return kept


def _share(model: nn.Module, site: Site, units: int) -> float:
    """Share of a layer's features that belongs to all units together."""
    found: Any = model.get_submodule(site.module)
    features = found.weight.shape[0 if site.side == "out" else 1]
    return units * site.size * len(site.starts) / features


def _own(model: nn.Module, macs: Mapping[str, int], name: str) -> int:
    """What a module computes itself, outside of the layers in it."""
    leaves = (key for key, module in model.get_submodule(name).named_modules() if key and not any(module.children()))
    return macs.get(name, 0) - sum(macs.get(f"{name}.{key}", 0) for key in leaves)


def _check(model: nn.Module, groups: Sequence[Group]) -> None:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for group in groups:
        for name in (*group.modules, *(site.module for site in group.sites)):
            if name not in known:
                raise ValueError(f"group {group.name!r} has {name!r}, which {type(model).__name__} has not")
