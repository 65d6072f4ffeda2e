"""Diffusion transformers: blocks in one or two lists, whose lengths stand in the stock config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffaccel.pruning.groups import Group
from diffaccel.pruning.numbering import Numbering

LENGTHS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


def depth(model: Any) -> tuple[list[Group], dict[str, str]]:
    """One group a block, and the blocks that must stay, with the reason."""
    groups, refused = [], {}
    for blocks in LENGTHS:
        for i, _ in enumerate(getattr(model, blocks, ())):
            name = f"{blocks}.{i}"
            if reason := _must_stay(model, name):
                refused[name] = reason
            else:
                groups.append(Group(name, "block", 1, (name,)))
    return groups, refused


def _must_stay(model: Any, name: str) -> str | None:
    """DiT's last norm reads the embedder of the first block (`transformer_blocks[0].norm1.emb`)."""
    if name != "transformer_blocks.0" or not hasattr(model, "proj_out_1"):
        return None
    embedders = [block.norm1.emb.state_dict() for block in model.transformer_blocks]
    first, *others = embedders
    if any(weight.is_meta for weight in first.values()):
        return None  # nobody knows here; a plan is checked again with the weights
    if all(torch.equal(weight, other[key]) for other in others for key, weight in first.items()):
        return None
    return f"{name} must stay: the last norm reads its embedder, which the other blocks do not share"


def stock_config(model: Any, config: dict[str, Any], gone: Sequence[Group]) -> dict[str, Any]:
    """Config of the stock class without the blocks `gone`.

    Raises:
        ValueError: if no block would be left.
    """
    removed = {name for group in gone for name in group.modules}
    changed = dict(config)
    for blocks, key in LENGTHS.items():
        if key in config:
            changed[key] = config[key] - sum(name.rpartition(".")[0] == blocks for name in removed)
    if sum(changed.get(key, 0) for key in LENGTHS.values()) < 1:
        raise ValueError("no transformer block would be left; keep one, or choose a higher target")
    if config.get("dual_attention_layers"):  # SD 3.5: indices of blocks
        numbering = Numbering(removed)
        names = (numbering.new(f"transformer_blocks.{i}") for i in config["dual_attention_layers"])
        changed["dual_attention_layers"] = tuple(int(name.rpartition(".")[2]) for name in names if name)
    return changed


def reordered_rows(model: Any, gone: Sequence[Group]) -> dict[str, list[int]]:
    """Rows to take, in this order, of layers that change their kind; by the old name of the layer, none if it goes.

    SD3's last block sends no text on: it has no output layers for it, and `norm1_context` is an
    `AdaLayerNormContinuous` (scale, shift), elsewhere an `AdaLayerNormZero` (shift, scale, gate, shift, scale, gate).
    """
    removed = {name for group in gone for name in group.modules}
    count = len(model.transformer_blocks)
    last = f"transformer_blocks.{count - 1}"
    if last not in removed or not getattr(model.transformer_blocks[-1], "context_pre_only", False):
        return {}
    kept = [i for i in range(count) if f"transformer_blocks.{i}" not in removed]
    if not kept:
        return {}  # `stock_config` says what is wrong
    block = f"transformer_blocks.{kept[-1]}"
    width = model.transformer_blocks[kept[-1]].norm1_context.linear.out_features // 6
    none: dict[str, list[int]] = {
        f"{block}.{layer}": [] for layer in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    }
    return none | {f"{block}.norm1_context.linear": [*range(width, 2 * width), *range(width)]}
