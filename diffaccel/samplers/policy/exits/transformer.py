"""Exits of diffusion transformers: the first blocks, then the head that all depths share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffaccel.pruning.families.transformer import LENGTHS
from diffaccel.samplers.policy.exits.tap import Tap
from diffaccel.samplers.policy.exits.view import view


def layers(model: Any) -> int:
    """Depth of the whole network: its blocks, in two lists one after the other for Flux."""
    return len(_names(model))


def taps(model: Any, depth: int) -> tuple[Tap, Tap]:
    """Where the features are before block `depth`, and after the last one."""
    names = _names(model)
    return Tap(names[depth], "in"), Tap(names[-1], "out")


def shallow(model: Any, depth: int, exit_map: nn.Module | None) -> Any:
    """The network with `depth` blocks; the lists keep their lengths, by which ControlNets share out their residuals."""
    names = _names(model)
    skipped = {name: Skipped(model.get_submodule(name)) for name in names[depth:]}
    skipped[names[depth]].exit_map = exit_map
    return view(model, skipped)


def residual(model: Any) -> bool:
    """Blocks add to what they are given: the features before and after are of one kind."""
    return True


def _names(model: Any) -> list[str]:
    return [f"{blocks}.{i}" for blocks in LENGTHS for i in range(len(getattr(model, blocks, ())))]


class Skipped(nn.Module):
    """What is left of a block: tokens pass, at the exit through its map."""

    def __init__(self, block: Any):
        super().__init__()
        self.joint = hasattr(block, "norm1_context") or hasattr(block, "proj_mlp")  # SD3, Flux: text goes with pixels
        self.context_pre_only = getattr(block, "context_pre_only", None)  # read around the block
        self.exit_map: nn.Module | None = None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any):
        """(N, tokens, C) in and out; with text, (text, tokens) out, as the block."""
        if self.exit_map is not None:
            hidden_states = self.exit_map(hidden_states)
        return (encoder_hidden_states, hidden_states) if self.joint else hidden_states
