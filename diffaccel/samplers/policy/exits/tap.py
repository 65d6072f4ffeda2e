"""Features of a network while it runs: what goes into a module, or comes out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Tap:
    """A place in a network.

    Attributes:
        module: dotted name.
        side: the hidden states that go "in", or come "out".
    """

    module: str
    side: Literal["in", "out"]


@contextmanager
def listening(model: nn.Module, taps: Mapping[Any, Tap]) -> Iterator[dict[Any, Tensor]]:
    """Features at each tap in the last call of `model`, by the keys of `taps`."""
    heard: dict[Any, Tensor] = {}
    handles = []
    for key, tap in taps.items():
        module = model.get_submodule(tap.module)

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any = key) -> None:
            heard[key] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach()

        def after(_: Any, args: Any, output: Any, key: Any = key) -> None:
            heard[key] = (output[1] if isinstance(output, tuple) else output).detach()  # joint blocks: (text, tokens)

        if tap.side == "in":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
