"""Gates on the units of a network: 1 leaves a unit as it is, 0 is the network without it, between is differentiable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffaccel.pruning.groups import Group, Site

Fill = Mapping[str, Tensor]  # name of a layer -> (in features,): what stands for the inputs that are removed


class Handle:
    """Hooks on a network; `remove()`, or the end of a `with` block, takes them off and restores every bit."""

    def __init__(self, handles: Sequence[RemovableHandle]):
        self._handles = list(handles)

    def remove(self) -> None:
        """Take the hooks off; a second time does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def gate(model: nn.Module, groups: Sequence[Group], gates: Mapping[str, Tensor], fill: Fill | None = None) -> Handle:
    """Multiply what every unit contributes by its gate.

    A unit of width acts through columns of some layers: the inputs of those layers are multiplied. A module that is
    left out whole is blended with its residual connection: gate * f(x) + (1 - gate) * x.

    Args:
        model: a network; its weights are not changed.
        groups: groups of it.
        gates: for every group its gates, shape (units,); may require gradients.
        fill: for layers named here the input that stands for a removed one, instead of zero: a mean that `cut` folds
            into the bias. Linear layers only.

    Raises:
        ValueError: if there is no group, gates of a wrong shape, or the network was compiled.
    """
    if not groups:
        raise ValueError("there is no group to put a gate on")
    check_eager(model)
    for group in groups:
        if tuple(gates[group.name].shape) != (group.units,):
            raise ValueError(
                f"{group.name} needs gates of shape ({group.units},), not {tuple(gates[group.name].shape)}"
            )
    inputs: dict[str, list[tuple[Site, Tensor]]] = {}
    handles = []
    for group in groups:
        for site in group.sites:
            if site.side == "in":
                inputs.setdefault(site.module, []).append((site, gates[group.name]))
        if not group.sites:
            hook = _bypass(gates[group.name])
            modules = [model.get_submodule(name) for name in group.modules]
            handles += [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    for name, parts in inputs.items():
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(_multiply(layer, parts, (fill or {}).get(name))))
    return Handle(handles)


def check_eager(model: nn.Module) -> None:
    """Nothing, if hooks that are put on the network now will be seen.

    Raises:
        ValueError: if the network, or a module of it, was compiled in place. Compiled code does not look for new hooks
            (`torch._dynamo.config.skip_nnmodule_hook_guards`), and one compiled with hooks keeps them.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            "this network was compiled in place, and hooks would do nothing; load it once more to prune it"
        )


def _multiply(layer: Any, parts: list[tuple[Site, Tensor]], fill: Tensor | None) -> Any:
    """Hook that multiplies the input of a layer, features of one unit by the same gate."""
    spatial = isinstance(layer, nn.Conv2d)
    features = layer.in_channels if spatial else layer.in_features
    placed = []  # one index for each part: which gate a feature has; the last for features of no unit
    for site, values in parts:
        index = torch.full((features,), len(values), dtype=torch.long)
        for unit in range(len(values)):
            index[site.features([unit])] = unit
        placed.append((index, values))

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        factor = torch.ones((), dtype=x.dtype, device=x.device)
        for index, values in placed:
            values = values.to(x.device, x.dtype)
            factor = factor * torch.cat([values, values.new_ones(1)])[index.to(x.device)]
        shape = (-1, 1, 1) if spatial else (-1,)
        gated = x * factor.view(shape)
        if fill is not None:
            gated = gated + (fill.to(x.device, x.dtype) * (1 - factor)).view(shape)
        return (gated, *args[1:])

    return hook


def _bypass(value: Tensor) -> Any:
    """Hook that blends the output of a module with what its residual connection alone would give."""

    def blend(output: Tensor | None, x: Tensor) -> Tensor | None:
        if output is None:  # SD3's last block has no text output
            return None
        kept = x[:, : output.shape[1]] if output.ndim == 4 else x  # on the way up the skip comes behind the features
        weight = value.to(output.device, output.dtype)
        return kept + weight * (output - kept)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, Tensor):
            return blend(output, x)
        if isinstance(output, tuple) and len(output) == 2:  # joint blocks: text first
            text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
            return blend(output[0], text), blend(output[1], x)
        if isinstance(output, tuple):
            return (blend(output[0], x),)
        output.sample = blend(output.sample, x)
        return output

    return hook
