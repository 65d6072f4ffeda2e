"""The hooks of sparse edits on a network, and whether they are still where they were put."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffaccel.hooking import register, unregister
from diffaccel.kernels.sites import sites

NAME = "diffaccel_sparse_edit"


class Attached:
    """Hooks on the modules of a network. LoRA that is loaded or unloaded replaces modules, and loses hooks.

    Args:
        engine: of the hooks.
        network: that has the modules.

    Raises:
        TypeError, ValueError: as `sites`.
    """

    def __init__(self, engine: Any, network: nn.Module):
        self._engine, self._network = engine, network
        self._places: list[tuple[nn.Module, str, nn.Module]] = []  # parent, attribute, module
        self._put()

    def complete(self) -> bool:
        """Whether all hooked modules are still part of the network."""
        return all(parent._modules.get(name) is module for parent, name, module in self._places)

    def renew(self) -> None:
        """Take the hooks off, and put them on what is there now."""
        self.remove()
        self._put()

    def remove(self) -> None:
        """Take all hooks off. A second time does nothing."""
        for _, _, module in self._places:
            unregister(module, NAME)
        self._places = []

    def _put(self) -> None:
        found = list(sites(self._engine, self._network))
        places = [(parent, name) for parent in self._network.modules() for name in parent._modules]
        parents = {parent._modules[name]: (parent, name) for parent, name in places}
        for module, hook in found:
            register(module, hook, NAME)
            self._places.append((*parents[module], module))
