"""The structure of a pruned network, as it stands in `config.json`: numbers only, applied to a network without weights.

`{"kept": {"transformer_blocks.0.attn1.heads": 5, ...}, "removed": ["down_blocks.1.layer.1", ...]}`, by the names of the
groups in the stock network of the same config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import nn

from diffaccel.pruning.families.unet import SkipTransformer
from diffaccel.pruning.find import find_groups
from diffaccel.pruning.groups import WIDTH, Group
from diffaccel.pruning.numbering import Numbering, numbering_of
from diffaccel.pruning.parts.attention import ConstantAttention, set_heads
from diffaccel.pruning.parts.constant import NoFeatures
from diffaccel.pruning.parts.feed_forward import ConstantFeedForward
from diffaccel.pruning.parts.flux_single import set_widths
from diffaccel.pruning.parts.layers import resized
from diffaccel.pruning.parts.resnet import ConstantResnet


def build(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A network from its config, parameters on the `meta` device, buffers real."""
    with init_empty_weights(include_buffers=False):
        return kind.from_config(dict(config))


def apply_structure(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Give a stock network the shapes of a pruned one, in place; its weights are new ones.

    Raises:
        ValueError: if the structure names what is not there, as when `config.json` was edited.
    """
    kept, removed = structure.get("kept", {}), structure.get("removed", [])
    if not kept and not removed:
        return
    found = find_groups(model).found
    if unknown := [name for name in (*kept, *removed) if name not in found]:
        raise ValueError(f"pruned_structure in the config names {unknown[0]}, which a {type(model).__name__} has not")
    shrink(model, found.values(), {name: found[name].units - count for name, count in kept.items()})
    leave_out(model, [found[name] for name in removed])


def leave_out(model: Any, gone: Iterable[Group]) -> None:
    """Take whole modules out, in place."""
    entries = []
    for group in gone:
        if group.kind == "mid_block":
            model.mid_block = None
        elif group.kind == "transformer":
            model.set_submodule(group.name, SkipTransformer())
        else:
            entries += [name.rpartition(".") for name in group.modules]
    # Innermost lists first and from behind: names of what is still to be deleted stay valid.
    for parent, _, index in sorted(entries, key=lambda entry: (-entry[0].count("."), -int(entry[2]))):
        del model.get_submodule(parent)[int(index)]


def shrink(root: nn.Module, groups: Iterable[Group], lost: Mapping[str, int], prefix: str = "") -> nn.Module:
    """Layers with fewer features for groups that lose units, in place and with new weights.

    Args:
        root: a network, or a module of one.
        groups: groups in it.
        lost: how many units each group loses; groups that are not named lose none.
        prefix: name of `root` in the network that the groups are named after.

    Returns:
        `root`, or what replaces it if it has lost all units.
    """
    holder = nn.ModuleDict({"root": root})  # so that `root` itself can be replaced
    losing = [group for group in groups if lost.get(group.name)]
    changes: dict[str, dict[str, int]] = {}
    for group in losing:
        for site in group.sites if not _becomes_constant(holder, group, lost, prefix) else ():
            change = changes.setdefault(site.module, {})
            count = lost[group.name] * site.size * len(site.starts)
            change[f"lost_{site.side}"] = change.get(f"lost_{site.side}", 0) + count
            change["lost_groups"] = lost[group.name] if group.kind == "channels" else 0
    for name, change in changes.items():
        path = _path(name, prefix)
        holder.set_submodule(path, resized(holder.get_submodule(path), **change))
    for group in losing:
        _finish(holder, group, group.units - lost[group.name], prefix)
    return holder["root"]


def _path(name: str, prefix: str) -> str:
    return f"root.{name.removeprefix(prefix).lstrip('.')}".rstrip(".")


def _becomes_constant(holder: nn.Module, group: Group, lost: Mapping[str, int], prefix: str) -> bool:
    single = isinstance(holder.get_submodule(_path(group.modules[0], prefix)), FluxSingleTransformerBlock)
    return lost[group.name] == group.units and not single


def _finish(holder: Any, group: Group, count: int, prefix: str) -> None:
    """Set what a module knows of its widths, or put a constant in its place."""
    path = _path(group.modules[0], prefix)
    module = holder.get_submodule(path)
    if isinstance(module, FluxSingleTransformerBlock):
        if group.kind == "heads" and count == 0:
            holder.set_submodule(f"{path}.attn", NoFeatures())
        elif group.kind == "heads":
            set_heads(module.attn, count)
        set_widths(module)
    elif count == 0:
        constants = {"heads": ConstantAttention, "neurons": ConstantFeedForward}
        holder.set_submodule(path, constants.get(group.kind, ConstantResnet)(module))
    elif group.kind == "heads":
        set_heads(module, count)


def structure_of(
    model: Any, gone: list[Group], counts: Mapping[str, int], numbering: Numbering, skeleton: nn.Module, native: bool
) -> dict[str, Any]:
    """Structure of what is left of `model`, on top of `skeleton`.

    Args:
        model: the network before it is cut; it may have been pruned before.
        gone: groups of depth that it loses.
        counts: units that are left in its groups of width; those that are not named are constants by now.
        numbering: from names in `model` to names in the result.
        skeleton: stock network of the config that the result will have.
        native: whether that config has no entries of lists that are gone.
    """
    before = {} if native else model.config.get("pruned_structure") or {}
    stock = find_groups(skeleton).found
    earlier = [stock[name] for name in before.get("removed", [])]
    into_stock = numbering_of(earlier)  # from names in `model` back to names in the skeleton
    by_modules = {group.modules: group.name for group in stock.values() if not group.sites}
    removed = [group.name for group in earlier]
    if not native:
        removed += [by_modules[tuple(map(into_stock.old, group.modules))] for group in gone]
    deleted = numbering_of([stock[name] for name in removed])
    skipped = [name for name, module in model.named_modules() if isinstance(module, SkipTransformer)]
    skipped += [group.name for group in gone if group.kind == "transformer"]
    final = [name for name in map(numbering.new, skipped) if name]
    removed += [name for name in map(deleted.old, final) if name not in removed]
    outer = [stock[name] for name in removed]
    inside = {group.name for group in stock.values() if any(other.contains(group) for other in outer)}
    kept = {}
    for group in stock.values():
        name = deleted.new(group.name)
        if group.kind in WIDTH and name and group.name not in inside:
            count = counts.get(numbering.old(name), 0)
            if count != group.units:
                kept[group.name] = count
    return {"kept": kept, "removed": [name for name in removed if name not in inside]}
