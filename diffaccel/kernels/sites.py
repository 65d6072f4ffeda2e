"""Which modules of a network the executors hook, and which networks they can serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from diffaccel.kernels.hooks import AttentionHook, Kind, NormHook, SiteHook, UpsampleHook, WindowHook
from diffaccel.kernels.tokens import TOKEN_PATHS, token_sites

# First and last module on the map, and what is beside the path from one to the other.
PATHS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "UNet2DConditionModel": ("conv_in", "conv_out", ()),
    "UNet2DModel": ("conv_in", "conv_out", ()),
    "ControlNetModel": ("conv_in", None, ("controlnet_cond_embedding.",)),
    "Decoder": ("conv_in", "conv_out", ()),
}

# They look beyond a pixel in ways that no hook here knows.
_FOREIGN = (
    *("FirUpsample2D", "FirDownsample2D", "KUpsample2D", "KDownsample2D", "ConvTranspose2d", "Conv1d", "Conv3d"),
    *("AdaGroupNorm", "SpatialNorm", "InstanceNorm2d", "TemporalConvLayer", "TransformerTemporalModel"),
    *("DualTransformer2DModel", "GatedSelfAttentionDense"),
)


def sites(engine: Any, network: nn.Module) -> Iterator[tuple[nn.Module, SiteHook]]:
    """Modules of the network, with a hook for each.

    Raises:
        ValueError: if one of them works in a way that a region cannot.
    """
    kind = kind_of(network)
    return token_sites(engine, network, kind) if kind in TOKEN_PATHS else _map_sites(engine, network, kind)


def _map_sites(engine: Any, network: nn.Module, cls: str) -> Iterator[tuple[nn.Module, SiteHook]]:
    entry, leave, beside = PATHS[cls]
    for name, module in network.named_modules():
        if name.startswith(beside):
            continue
        parent = network.get_submodule(name.rpartition(".")[0])
        if (reason := _refused(name, module)) is not None:
            raise ValueError(f"{type(network).__name__} has {reason}; sparse edits do not know it")
        if isinstance(module, nn.Conv2d | nn.AvgPool2d):
            kind: Kind = "inner"
            if _named(name, entry):
                kind = "entry"
            elif leave is not None and _named(name, leave):
                kind = "exit"
            elif any(type(p).__name__ == "Upsample2D" for p in (parent, _above(network, name, 2))):
                kind = "upsampled"
            if kind != "inner" or _pair(module.kernel_size) != (1, 1) or _pair(module.stride) != (1, 1):
                yield module, WindowHook(engine, name, kind, _trailing(parent, _above(network, name, 2)))
        elif isinstance(module, nn.GroupNorm):
            yield module, NormHook(engine, name)
        elif type(module).__name__ == "Upsample2D":
            yield module, UpsampleHook(engine, name)
        elif type(module).__name__ == "Attention" and not getattr(module, "is_cross_attention", False):
            yield module, AttentionHook(engine, name)


def kind_of(network: nn.Module) -> str:
    """The class of Diffusers that the network is of; pruned classes of ours are derived from theirs.

    Raises:
        TypeError: if sparse edits do not know it.
    """
    for cls in type(network).__mro__:
        if cls.__name__ in (*PATHS, *TOKEN_PATHS) and cls.__module__.startswith("diffusers"):
            return cls.__name__
    raise TypeError(f"sparse edits know {', '.join((*PATHS, *TOKEN_PATHS))}; not {type(network).__name__}")


def _refused(name: str, module: Any) -> str | None:
    kind = type(module).__name__
    if kind in _FOREIGN:
        return f"a {kind} ({name})"
    if kind == "Upsample2D" and (module.norm is not None or module.use_conv_transpose or not module.interpolate):
        return f"an Upsample2D with a norm, a transposed convolution or no interpolation ({name})"
    if kind == "Downsample2D" and module.norm is not None:
        return f"a Downsample2D with a norm ({name})"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"a convolution with padding_mode={module.padding_mode!r} ({name})"
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        return f"a convolution with padding={module.padding!r} ({name})"
    if kind == "Attention" and getattr(module, "added_kv_proj_dim", None) is not None:
        return f"an attention that joins the prompt's keys with the picture's ({name})"
    return None


def _trailing(*parents: Any) -> int:
    """`Downsample2D` with padding 0 appends a row and a column of zeros."""
    return int(any(type(p).__name__ == "Downsample2D" and p.use_conv and p.padding == 0 for p in parents))


def _above(network: nn.Module, name: str, levels: int) -> nn.Module | None:
    """Where LoRA wraps a layer, the layer's parent is one level up."""
    parts = name.split(".")
    return network.get_submodule(".".join(parts[:-levels])) if len(parts) > levels else None


def _named(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
