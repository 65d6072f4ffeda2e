"""Self-attention on regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffaccel.kernels.hooks import SiteHook


class AttentionHook(SiteHook):
    """Self-attention: queries of the region, keys and values of the reference with the region's in their place."""

    def new_forward(self, module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `SiteHook` says; attention to the prompt stays as it is."""
        engine = self.engine
        crossed = args[0] if args else kwargs.get("encoder_hidden_states")
        if engine.mode == "off" or (crossed is not None and not engine.joint):
            return self.original(hidden_states, *args, **kwargs)
        change = self._record if engine.mode == "record" else self._sparse
        seen = KeysValues(change)
        with seen:
            out = self.original(hidden_states, *args, **kwargs)
        if seen.calls != 1:
            raise RuntimeError(
                f"{self.name} called scaled_dot_product_attention {seen.calls} times, and sparse edits need one call; "
                "give the module a processor that does, attention.set_processor(AttnProcessor2_0()), and do not fuse it"
            )
        return out

    def _record(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.engine.slot.put(f"{self.name}.k", key)
        self.engine.slot.put(f"{self.name}.v", value)
        return key, value

    def _sparse(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        engine, names = self.engine, (f"{self.name}.k", f"{self.name}.v")
        layout = engine.layout(engine.slot[names[0]].shape[2])
        if layout is None:  # this level runs dense
            self.offer_whole(names[0], key)
            self.offer_whole(names[1], value)
            return key, value
        both = []
        for name, part in zip(names, (key, value), strict=True):
            engine.slot.offer(name, part, layout)
            both.append(layout.write(engine.slot[name].to(part, copy=True), part))
        return both[0], both[1]


class KeysValues(TorchFunctionMode):
    """Changes keys and values on their way into `scaled_dot_product_attention`, whatever computed them.

    That is after rotary embeddings and normalisation, so that what is kept is used as it is.
    """

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
        super().__init__()
        self._change, self.calls = change, 0

    def __torch_function__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Pass everything on but that one function."""
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        query, key, value = [*args[:3], *(kwargs.pop(name) for name in ("query", "key", "value")[len(args) :])]
        return func(query, *self._change(key, value), *args[3:], **kwargs)
