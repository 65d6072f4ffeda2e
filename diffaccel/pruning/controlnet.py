"""ControlNets of the original U-Net for one that has lost layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffaccel.pruning.find import find_groups
from diffaccel.pruning.gates import Handle
from diffaccel.pruning.plan import PruningPlan


def fit_controlnet(controlnet: nn.Module, plan: PruningPlan) -> Handle:
    """Make a ControlNet (or several in one) leave out the residuals for which a pruned U-Net has no skip any more.

    Only the removal of a `layer` changes the number of skips: as it is, a ControlNet then ends in an error about sizes,
    or, in the last stage, adds its residuals one place off without a word. Where layer j of a stage goes, the residual
    of layer j - 1 goes: the layer on the way up that used to take the skip of layer j takes that of layer j - 1 now,
    and that skip gets the residual of layer j. So the U-Net computes what its mask computes with all residuals.

    Args:
        controlnet: its outputs are changed by a hook, its weights are not.
        plan: of the pruned U-Net.

    Returns:
        A handle; `remove()` takes the hook off.

    Raises:
        ValueError: if the plan removes no layer of a U-Net: then every ControlNet fits as it is.
    """
    gone = _residuals(plan)
    if not gone:
        raise ValueError("this plan removes no layer of a U-Net; its ControlNets fit as they are")

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        down = output[0] if isinstance(output, tuple) else output.down_block_res_samples
        kept = type(down)(residual for i, residual in enumerate(down) if i not in gone)
        if isinstance(output, tuple):
            return (kept, *output[1:])
        output.down_block_res_samples = kept
        return output

    return Handle([controlnet.register_forward_hook(hook)])


def _residuals(plan: PruningPlan) -> set[int]:
    """Places of the residuals that go: the first is that of `conv_in`, then layers and downsampler, stage by stage."""
    model = plan.original()
    layers = {group.name for group in plan.gone(find_groups(model)) if group.kind == "layer"}
    gone, place = set(), 1
    for i, stage in enumerate(getattr(model, "down_blocks", ())):
        gone |= {place + j - 1 for j in range(len(stage.resnets)) if f"down_blocks.{i}.layer.{j}" in layers}
        place += len(stage.resnets) + (stage.downsamplers is not None)
    return gone
