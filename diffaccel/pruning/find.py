"""The groups of a Diffusers network: what of it can be removed, and what cannot, with the reason."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from torch import nn

from diffaccel.pruning.families import family_of
from diffaccel.pruning.groups import Group, Groups, NotPrunableError
from diffaccel.pruning.parts.attention import heads
from diffaccel.pruning.parts.feed_forward import neurons
from diffaccel.pruning.parts.flux_single import heads_and_neurons
from diffaccel.pruning.parts.resnet import channels

BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")

MOVED = {"group_offloading", "layerwise_casting"}  # hooks of Diffusers


def find_groups(model: nn.Module) -> Groups:
    """Everything of a network that can be removed so that the rest computes exactly what a mask would leave.

    Looked for inside the blocks of the network; embeddings, first and last layers stay. Residual widths stay too: their
    norms would change (pruning.md 9.4).

    Args:
        model: `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, `PixArtTransformer2DModel`,
            `SD3Transformer2DModel`, `FluxTransformer2DModel`, or one of these that was pruned before. Only shapes are
            looked at, so it may be on the `meta` device.

    Raises:
        TypeError: for another class.
        ValueError: if nothing in it can be removed; the message has the first reason. Or if its weights are elsewhere,
            or of another type, until a hook fetches them (offloading, layerwise casting).
    """
    family = family_of(model)
    _check_hooks(model)
    found: dict[str, Group] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if name.split(".")[0] not in BLOCKS:
            continue
        try:
            groups = _width(name, module)
        except NotPrunableError as error:
            refused[name] = str(error)
            continue
        found |= {group.name: group for group in groups}
    depth, no_depth = family.depth(model)
    found |= {group.name: group for group in depth}
    if not any(group.sites for group in found.values()) and refused:
        raise ValueError(f"nothing in this {type(model).__name__} can be pruned: {next(iter(refused.values()))}")
    return Groups(found, refused | no_depth)


def _check_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        away = hasattr(module, "_hf_hook") and any(weight.is_meta for weight in module.parameters())
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if away or not MOVED.isdisjoint(hooks):
            raise ValueError(
                f"weights of {name or 'this network'} are moved or cast by hooks (offloading, layerwise casting); "
                "load it without, prune, and do that with the result"
            )


def _width(name: str, module: Any) -> list[Group]:
    if isinstance(module, FluxSingleTransformerBlock):
        return heads_and_neurons(name, module)
    if isinstance(module, FluxAttention) and module.pre_only:
        return []  # its columns are in the block's `proj_out`: see above
    if isinstance(module, Attention | FluxAttention):
        return [heads(name, module)]
    if isinstance(module, FeedForward):
        return [neurons(name, module)]
    if isinstance(module, ResnetBlock2D):
        return channels(name, module)
    return []
