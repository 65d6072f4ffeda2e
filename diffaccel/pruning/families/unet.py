"""U-Nets: layers of a stage with their partners on the way up, transformers, the middle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel, Transformer2DModelOutput
from torch import Tensor, nn

from diffaccel.pruning.groups import Group

DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D")  # their layers are called one after the other
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D")


def depth(model: Any) -> tuple[list[Group], dict[str, str]]:
    """Groups of depth (ResNet bodies are found with their channels), and what must stay, with the reason."""
    groups, refused = [], {}
    for name, module in model.named_modules():
        if type(module) is Transformer2DModel:
            groups.append(Group(name, "transformer", 1, (name,)))
            blocks = [f"{name}.transformer_blocks.{i}" for i in range(len(module.transformer_blocks))]
            groups += [Group(block, "block", 1, (block,)) for block in blocks]
    for i, down in enumerate(model.down_blocks):
        up = model.up_blocks[len(model.down_blocks) - 1 - i]
        if type(down).__name__ in DOWN and type(up).__name__ in UP:
            groups += _layers(model, i, down, up)
            refused[f"down_blocks.{i}.layer.0"] = "the first layer of a stage must stay: it changes the width"
        else:
            refused[f"down_blocks.{i}"] = f"layers of a {type(down).__name__} are not known well enough to be left out"
    if model.mid_block is not None:
        groups.append(Group("mid_block", "mid_block", 1, ("mid_block",)))
    return groups, refused


def _layers(model: Any, i: int, down: Any, up: Any) -> list[Group]:
    """Layer j of a stage goes with layer L - j of its mirror stage, L the layers of the stage (BK-SDM's pairs).

    Then every skip that is left finds the layer it had before. The first layer on either way changes the width, and the
    last one on the way up takes the skip of the stage before: they stay.
    """
    mirror = len(model.down_blocks) - 1 - i
    count = len(down.resnets)
    if len(up.resnets) != count + 1:
        return []
    groups = []
    for j in range(1, count):
        pair = [(f"down_blocks.{i}", down, j), (f"up_blocks.{mirror}", up, count - j)]
        modules = [f"{stage}.resnets.{k}" for stage, _, k in pair]
        modules += [f"{stage}.attentions.{k}" for stage, block, k in pair if hasattr(block, "attentions")]
        groups.append(Group(f"down_blocks.{i}.layer.{j}", "layer", 1, tuple(modules)))
    return groups


def stock_config(model: Any, config: dict[str, Any], gone: Sequence[Group]) -> dict[str, Any] | None:
    """Config of the stock class without `gone` (layers, transformer blocks, the middle), or None.

    None where a config cannot say it: a transformer alone, different numbers of layers in a `UNet2DModel`. A config
    that says it wrongly (SDXL's middle takes its depth from the list of the last stage) is found out by `cut`, which
    compares names and shapes.
    """
    if any(group.kind == "transformer" for group in gone):
        return None
    removed = {name for group in gone for name in group.modules}
    changed = dict(config)
    if "mid_block" in removed:
        changed["mid_block_type"] = None
    stages = [_kept_layers(stage, f"down_blocks.{i}", removed) for i, stage in enumerate(model.down_blocks)]
    counts = [len(layers) for layers in stages]
    if counts != _listed(config["layers_per_block"], len(counts)):
        if len(set(counts)) > 1 and not hasattr(model, "encoder_hid_proj"):
            return None  # `UNet2DModel` knows one number
        changed["layers_per_block"] = counts[0] if len(set(counts)) == 1 else counts
    nested = any(isinstance(entry, list | tuple) for entry in _listed(config.get("transformer_layers_per_block"), 1))
    if nested or any(group.kind == "block" for group in gone):
        changed |= _nested(model, config, stages, removed)
    return changed


def _listed(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _kept_layers(stage: Any, name: str, removed: set[str]) -> list[int]:
    """Transformer blocks of each layer of a stage that stays; 0 for a layer without attention."""
    depths = []
    for j in range(len(stage.resnets)):
        if f"{name}.resnets.{j}" in removed:
            continue
        blocks = getattr(stage.attentions[j], "transformer_blocks", ()) if hasattr(stage, "attentions") else ()
        prefix = f"{name}.attentions.{j}.transformer_blocks"
        depths.append(sum(f"{prefix}.{k}" not in removed for k in range(len(blocks))))
    return depths


def _nested(model: Any, config: dict[str, Any], down: list[list[int]], removed: set[str]) -> dict[str, Any]:
    """`transformer_layers_per_block` with one number for each layer, and its reverse (SSD-1B's form)."""
    up = [_kept_layers(stage, f"up_blocks.{i}", removed) for i, stage in enumerate(model.up_blocks)]
    mid = config["transformer_layers_per_block"]
    mid = mid[-1] if isinstance(mid, list | tuple) else mid
    middle: Any = next(iter(getattr(model.mid_block, "attentions", ())), None)
    if hasattr(middle, "transformer_blocks") and not hasattr(model.down_blocks[-1], "attentions"):
        blocks = middle.transformer_blocks
        mid = sum(f"mid_block.attentions.0.transformer_blocks.{k}" not in removed for k in range(len(blocks)))
        down = [*down[:-1], [mid]]  # a last stage without attention does not read its entry, the middle does
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def reordered_rows(model: Any, gone: Sequence[Group]) -> dict[str, list[int]]:
    """No layer of a U-Net changes its kind."""
    return {}


class SkipTransformer(nn.Module):
    """What is left of a `Transformer2DModel`: its residual connection."""

    def forward(self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any):
        """(N, C, H, W) unchanged, in the container that the transformer returns."""
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)
