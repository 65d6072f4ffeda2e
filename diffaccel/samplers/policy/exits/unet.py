"""Exits of U-Nets: the outer levels, without the inner ones and the middle."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from diffaccel.pruning.families.unet import DOWN, UP, SkipTransformer
from diffaccel.samplers.policy.exits.tap import Tap
from diffaccel.samplers.policy.exits.view import view


def layers(model: Any) -> int:
    """Depth of the whole network: its levels of resolution."""
    return len(model.down_blocks)


def taps(model: Any, depth: int) -> tuple[Tap, Tap]:
    """Where the features are before level `depth`, and on its way back, before they are upsampled."""
    mirror = layers(model) - 1 - depth
    return Tap(f"down_blocks.{depth}", "in"), Tap(f"up_blocks.{mirror}.upsamplers.0", "in")


def residual(model: Any) -> bool:
    """The way down and the way up have features of different kinds."""
    return False


def shallow(model: Any, depth: int, exit_map: nn.Module | None) -> Any:
    """The network with `depth` levels: an affine map in place of the others, or their shortcuts.

    Without a map every ResNet inside is its shortcut and every attention nothing, as AutoDiffusion skips layers
    (arXiv:2309.10438): for networks that are trained so. What resamples stays.

    Raises:
        TypeError: for a level whose blocks are of a kind that is not known.
    """
    mirror = layers(model) - 1 - depth
    inner = [f"down_blocks.{i}" for i in range(depth, layers(model))] + [f"up_blocks.{i}" for i in range(mirror + 1)]
    for name in inner:
        if type(block := model.get_submodule(name)).__name__ not in DOWN + UP:
            raise TypeError(f"an exit before a {type(block).__name__} is not known; give a greater depth than {depth}")
    if exit_map is None:
        return view(model, _shortcuts(model, [*inner, "mid_block"]))
    replaced: dict[str, nn.Module] = {name: _Absent(model.get_submodule(name)) for name in inner}
    replaced[f"up_blocks.{mirror}"] = _Exit(model.up_blocks[mirror], exit_map)
    if model.mid_block is not None:
        replaced["mid_block"] = _Absent(model.mid_block)
    return view(model, replaced)


def _shortcuts(model: nn.Module, stages: list[str]) -> dict[str, nn.Module]:
    replaced: dict[str, nn.Module] = {}
    for stage in stages:
        block = getattr(model, stage) if "." not in stage else model.get_submodule(stage)
        for i, resnet in enumerate(getattr(block, "resnets", ())):
            replaced[f"{stage}.resnets.{i}"] = Shortcut(resnet)
        for i, attention in enumerate(getattr(block, "attentions", ())):
            if attention is not None:
                skip = Pass(attention) if isinstance(attention, Attention) else SkipTransformer()
                replaced[f"{stage}.attentions.{i}"] = skip
    return replaced


class Pass(nn.Module):
    """An attention that adds nothing."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.rescale_output_factor = attention.rescale_output_factor

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Its input."""
        return hidden_states / self.rescale_output_factor


class Shortcut(nn.Module):
    """A ResNet without its body."""

    def __init__(self, resnet: Any):
        super().__init__()
        self.conv_shortcut, self.output_scale_factor = resnet.conv_shortcut, resnet.output_scale_factor

    def forward(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Its shortcut."""
        x = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return x / self.output_scale_factor


class _Absent(nn.Module):
    """A stage that is not there. A scalar 0 stands for its features: residuals of a ControlNet can be added to it."""

    has_cross_attention = True  # then a T2I adapter's residual is an argument, else it would be added to the scalar

    def __init__(self, block: Any):
        super().__init__()
        # How many skips the stage leaves (down), or takes (up: the U-Net reads the length of `resnets`)
        self.resnets = range(len(getattr(block, "resnets", ())))  # type: ignore[assignment]
        self.skips = len(self.resnets) + (getattr(block, "downsamplers", None) is not None)
        self.down = type(block).__name__ in DOWN

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        zero = hidden_states.new_zeros(())
        return (zero, (zero,) * self.skips) if self.down else zero


class _Exit(nn.Module):
    """The last stage on the way up that is not there: its first skip, which went into the first absent level."""

    def __init__(self, block: Any, exit_map: nn.Module):
        super().__init__()
        self.has_cross_attention = getattr(block, "has_cross_attention", False)
        self.resnets = range(len(block.resnets))  # type: ignore[assignment]
        self.exit_map, self.upsamplers = exit_map, block.upsamplers
        if any(not isinstance(upsampler, Upsample2D) for upsampler in block.upsamplers):
            raise TypeError(f"an exit into a {type(block).__name__} that upsamples by a ResNet is not known")

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        *args: Any,
        upsample_size: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        x = self.exit_map(res_hidden_states_tuple[0])
        for upsampler in self.upsamplers:
            x = upsampler(x, upsample_size)
        return x
