"""A network's shapes without its numbers: counting on them costs neither memory nor time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn


def meta_copy(model: nn.Module) -> Any:
    """A copy of `model` on the meta device; its weights are never copied.

    Hooks are left out: gates and recorders would meet tensors without numbers, Accelerate's and Diffusers' would move
    them, and know other networks of the pipeline. Layerwise casting is replaced by its compute type.
    """
    # `deepcopy` takes what it finds in its memo instead of copying: every tensor is there.
    tensors = [*model.parameters(), *model.buffers()]
    known: dict[int, Any] = {id(tensor): _meta(tensor) for tensor in tensors}
    known |= {id(module._hf_hook): ModelHook() for module in model.modules() if hasattr(module, "_hf_hook")}
    copied = copy.deepcopy(model, known)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if (registry := vars(module).pop("_diffusers_hook", None)) is not None:
            vars(module).pop("forward", None)  # bound to the original, see `PolicyHook`
            if (casting := registry.get_hook("layerwise_casting")) is not None:
                module.to(casting.compute_dtype)
    return copied


def to_meta(values: Any) -> Any:
    """The same nest of dicts, lists and tuples, with its tensors on the meta device."""
    if isinstance(values, Tensor):
        return values.to("meta")
    if isinstance(values, dict):
        return {name: to_meta(value) for name, value in values.items()}
    return type(values)(to_meta(value) for value in values) if isinstance(values, list | tuple) else values


def _meta(tensor: Tensor) -> Tensor:
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
