"""Subclasses of Diffusers' networks whose config also has the widths that a stock config cannot say.

They open as any other: `from_pretrained`, in a whole pipeline, in half precision, sharded, quantised, once `diffaccel`
is imported. A subclass, not a quantiser (ecosystem.md B7): less private API, and a quantised pipeline still loads.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from diffaccel.pruning.families import FAMILIES
from diffaccel.pruning.structure import apply_structure

NAMES = {f"Pruned{stock.__name__}": stock for stock in FAMILIES}


@cache
def pruned_class(stock: type) -> type:
    """`PrunedUNet2DConditionModel` for `UNet2DConditionModel`, and so on."""

    def __init__(self: Any, *args: Any, pruned_structure: dict[str, Any] | None = None, **config: Any) -> None:  # noqa: N807
        stock.__init__(self, *args, **config)
        apply_structure(self, pruned_structure or {})
        self.register_to_config(pruned_structure=pruned_structure)

    # Diffusers reads the keys of a config from the signature; any that is not there would be dropped.
    signature = inspect.signature(stock.__init__)
    extra = inspect.Parameter("pruned_structure", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    doc = f"A `{stock.__name__}` with fewer heads, neurons, channels or blocks: `pruned_structure` says how many."
    members = {"__init__": __init__, "__doc__": doc, "__module__": "diffaccel", "stock": stock}
    if hasattr(stock, "_load_ip_adapter_weights"):
        members["_load_ip_adapter_weights"] = _load_ip_adapter_weights
    kind = type(f"Pruned{stock.__name__}", (stock,), members)
    _scale_loras_alike(stock, kind)
    return kind


def _load_ip_adapter_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse an IP-Adapter where heads or attentions are gone: its keys would be cut into wrong heads, silently."""
    structure = self.config.pruned_structure or {}
    if structure.get("removed") or any(name.endswith(".heads") for name in structure.get("kept", ())):
        raise ValueError(
            "an IP-Adapter is for all heads and blocks of the original; prune only neurons or channels for it"
        )
    return self.stock._load_ip_adapter_weights(self, *args, **kwargs)


def _scale_loras_alike(stock: type, kind: type) -> None:
    """Diffusers looks up by class name how LoRA scales per block are read; private, so that it may be missing."""
    try:
        from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING
    except ImportError:
        return
    if stock.__name__ in _SET_ADAPTER_SCALE_FN_MAPPING:
        _SET_ADAPTER_SCALE_FN_MAPPING[kind.__name__] = _SET_ADAPTER_SCALE_FN_MAPPING[stock.__name__]
