"""Cutting: a new, smaller network from a network and a plan. What it computes is what the mask of the plan computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

from diffaccel.pruning.families import family_of, stock_class
from diffaccel.pruning.gates import Fill, Handle, gate
from diffaccel.pruning.groups import Group, Groups
from diffaccel.pruning.models import pruned_class
from diffaccel.pruning.numbering import Numbering, numbering_of
from diffaccel.pruning.plan import PruningPlan
from diffaccel.pruning.structure import build, structure_of


def mask(model: nn.Module, plan: PruningPlan, fill: Fill | None = None) -> Handle:
    """Make `model` compute what it will compute after `cut`, at the cost it has now; `remove()` undoes it.

    Raises:
        ValueError: if the plan is for another network.
    """
    checked = plan.check(model)
    groups = checked.found
    _check_fill(model, plan, checked, fill or {})
    gates = {name: torch.ones(groups[name].units) for name in plan.removed}
    for name, units in plan.removed.items():
        gates[name][list(units)] = 0
    return gate(model, [groups[name] for name in gates], gates, fill)


@torch.no_grad()
def cut(model: nn.Module, plan: PruningPlan, fill: Fill | None = None) -> nn.Module:
    """A network without the units of `plan`; `model` is left as it is, no memory is shared.

    A stock Diffusers class where its config can say the shapes (depth alone, mostly), else the subclass `Pruned...` of
    it, whose config has them. How the original is run is not taken over: its attention processors, gradient
    checkpointing, frozen weights, compilation, hooks.

    Args:
        model: a network on any device, the `meta` device included, in any floating-point type.
        plan: made for a network of this structure.
        fill: for layers named here, the input that stands for removed ones; its product with the weights goes to the
            bias (FLAP's compensation, arXiv:2312.11983, section 4.3). Linear layers with a bias only.

    Raises:
        ValueError: if the plan is for another network, nothing would be left of it, or the network has weights that
            its config does not tell of (a LoRA).
    """
    groups = plan.check(model)
    _check_fill(model, plan, groups, fill or {})
    gone = plan.gone(groups)
    state = _reduced_state(model, plan, groups, gone, fill or {})
    smaller = _skeleton(model, plan, groups, gone, state)
    smaller.load_state_dict(state, strict=True, assign=True)
    _take_buffers(model, smaller, numbering_of(gone))
    return smaller.train(model.training)


def _check_fill(model: nn.Module, plan: PruningPlan, groups: Groups, fill: Fill) -> None:
    """Refuse what a mask could put in and no bias can: there is none, or the kernel is padded with zeros."""
    for name in (layer for side, layer in removed_features(plan, groups) if side == "in" and layer in fill):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise ValueError(f"fill has {name}, which is no Linear with a bias to put it into; leave it out")


def _skeleton(model: Any, plan: PruningPlan, groups: Groups, gone: list[Group], state: dict[str, Tensor]) -> nn.Module:
    """The smaller network without weights: of the stock class, if its config can say these shapes."""
    stock = stock_class(model)
    base = {k: v for k, v in dict(model.config).items() if not k.startswith("_") and k != "pruned_structure"}
    counts = {name: group.units - len(plan.removed.get(name, ())) for name, group in groups.found.items()}
    for name in plan.removed:
        if groups.found[name].kind == "resnet":
            counts[name.removesuffix("body") + "channels"] = 0
    for config in (family_of(model).stock_config(model, base, gone), base):
        if config is None:
            continue
        skeleton = build(stock, config)
        structure = structure_of(model, gone, counts, numbering_of(gone), skeleton, native=config is not base)
        if structure["kept"] or structure["removed"]:
            skeleton = build(pruned_class(stock), config | {"pruned_structure": structure})
        if _shapes(skeleton.state_dict()) == _shapes(state):
            return skeleton
    _check_weights(model, plan)
    raise RuntimeError(f"no config says the shapes of this pruned {stock.__name__}: our error, please report it")


def _check_weights(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a network that is no longer what its config says."""
    there, said = _shapes(model.state_dict()), _shapes(plan.original().state_dict())
    if changed := [name for name in (*there, *said) if there.get(name) != said.get(name)]:
        raise ValueError(
            f"{changed[0]} of this network is not what its config says ({len(changed)} such weights); fuse or unload "
            "LoRAs and other adapters first, and register changed layers in the config"
        )


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _reduced_state(model: Any, plan: PruningPlan, groups: Groups, gone: list[Group], fill: Fill) -> dict[str, Tensor]:
    """State dict of the smaller network: names, rows and columns that are left."""
    numbering, reordered = numbering_of(gone), family_of(model).reordered_rows(model, gone)
    removed = removed_features(plan, groups)
    is_gone = vanished(model, plan, groups, gone)
    state = {}
    for name, value in model.state_dict().items():
        new = numbering.new(name)
        layer, _, kind = name.rpartition(".")
        rows = reordered.get(layer)
        if new is None or is_gone(name) or rows == []:
            continue
        if kind == "bias" and layer in fill and ("in", layer) in removed:
            columns = sorted(removed["in", layer])
            weight = model.get_submodule(layer).weight
            mean = fill[layer][columns].to(weight.device, torch.float32)
            value = value + (weight[:, columns].float() @ mean).to(value.dtype)
        if rows is not None:
            value = value[rows]
        if ("out", layer) in removed:
            value = without(value, 0, removed["out", layer])
        if ("in", layer) in removed and kind == "weight":
            value = without(value, 1, removed["in", layer])
        if value.numel():  # a layer without features has no weights
            state[new] = value.clone()
    return state


def removed_features(plan: PruningPlan, groups: Groups) -> dict[tuple[str, str], set[int]]:
    """(side, layer) -> features that go; several groups may share the columns of a layer."""
    removed: dict[tuple[str, str], set[int]] = {}
    for name, units in plan.removed.items():
        for site in groups.found[name].sites:
            removed.setdefault((site.side, site.module), set()).update(site.features(units))
    return removed


def without(value: Tensor, dim: int, features: set[int]) -> Tensor:
    """Copy of `value` without these indices of a dimension."""
    kept = [i for i in range(value.shape[dim]) if i not in features]
    return value.index_select(dim, torch.tensor(kept, dtype=torch.long, device=value.device))


def vanished(model: nn.Module, plan: PruningPlan, groups: Groups, gone: list[Group]) -> Callable[[str], bool]:
    """Whether a parameter has no place any more: its module is left out, or is a constant now."""
    whole = tuple(f"{name}." for group in gone for name in group.modules)
    prefixes: tuple[str, ...] = ()
    left: set[str] = set()
    for name, units in plan.removed.items():
        group = groups.found[name]
        if not group.sites or len(units) < group.units:
            continue
        module = group.modules[0]
        if isinstance(model.get_submodule(module), FluxSingleTransformerBlock):
            prefixes += (f"{group.attention}.",) if group.attention else ()
            continue
        prefixes += (f"{module}.",)
        left |= {f"{site.module}.bias" for site in group.sites if site.side == "in"}
        left |= {f"{module}.conv_shortcut.weight", f"{module}.conv_shortcut.bias"}
    return lambda name: name.startswith(whole) or (name.startswith(prefixes) and name not in left)


def _take_buffers(model: nn.Module, smaller: nn.Module, numbering: Numbering) -> None:
    """Buffers that are not saved (position embeddings), with their device and type."""
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        new = numbering.new(name)
        if name in saved or new is None:
            continue
        module, _, key = new.rpartition(".")
        smaller.get_submodule(module)._buffers[key] = buffer.clone()
