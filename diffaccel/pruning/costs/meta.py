"""A network's shapes without its numbers: counting on them costs neither memory nor time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def meta_copy(model: nn.Module) -> Any:
    """A copy of `model` on the meta device; its weights are never copied.

    Forward hooks are left out: gates and recorders would meet tensors without numbers.
    """
    # `deepcopy` takes what it finds in its memo instead of copying: every tensor is there.
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): _meta(tensor) for tensor in tensors})
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
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
