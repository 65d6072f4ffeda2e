"""Put hooks of Diffusers on modules, inside of Accelerate's, and take them off without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn


@contextmanager
def beneath_offloading(module: Any) -> Iterator[None]:
    """Without Accelerate's hook on `module` while the block runs: it puts back the `forward` that it found."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
    try:
        yield
    finally:
        if hook is not None:
            add_hook_to_module(module, hook)


def register(module: nn.Module, hook: ModelHook, name: str) -> None:
    """Put the hook on the module, inside of Accelerate's."""
    with beneath_offloading(module):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def unregister(module: Any, name: str) -> None:
    """Take it off; nothing of it stays."""
    with beneath_offloading(module):
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.remove_hook(name, recurse=False)
        if not registry.hooks:
            del module._diffusers_hook
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]  # the bound method that Diffusers put back


def hook_on(module: nn.Module, name: str) -> Any:
    """The hook of that name on the module, or None."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry.get_hook(name) if registry is not None else None
