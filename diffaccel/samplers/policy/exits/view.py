"""Another arrangement of the same modules: a network that shares its weights with the one it was made from."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

# What offloading, Diffusers' hooks and compilation leave on a module, bound to that module
_NOT_SHARED = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def view(module: nn.Module, replaced: Mapping[str, nn.Module]) -> Any:
    """A module that computes as `module` does, but with other submodules in the places that are named.

    Only the modules on the way to those places are new objects. All others, and all weights and buffers, are the same
    ones: what is moved, cast, trained or loaded into them later (a LoRA in an attention) is seen by both. What is put
    in their place later, directly in one of the new objects (a LoRA in `conv_in`), is not: make views when they are
    needed, they cost little. PyTorch's hooks on `module` itself are not the view's, which is called inside of them.

    Args:
        module: what the view is of; it is left as it is.
        replaced: new submodules by their dotted names.

    Raises:
        KeyError: if there is no submodule of such a name.
    """
    twin = _twin(module, replaced)
    for name in _HOOKS:
        setattr(twin, name, OrderedDict())
    return twin


def _twin(module: nn.Module, replaced: Mapping[str, nn.Module]) -> Any:
    twin = copy.copy(module)
    for name in _NOT_SHARED:
        twin.__dict__.pop(name, None)
    twin._compiled_call_impl = None
    twin._modules = dict(module._modules)
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, new in replaced.items():
        child, _, rest = name.partition(".")
        if child not in twin._modules:
            raise KeyError(f"{type(module).__name__} has no submodule {name}")
        if rest:
            inner.setdefault(child, {})[rest] = new
        else:
            twin._modules[child] = new
    for child, changes in inner.items():
        twin._modules[child] = _twin(module._modules[child], changes)  # type: ignore[arg-type]
    return twin
