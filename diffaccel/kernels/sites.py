"""Which modules of a network the executors hook, and which networks they can serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from diffaccel.kernels.attention import AttentionHook
from diffaccel.kernels.hooks import BesideHook, Kind, SiteHook, UpsampleHook, WindowHook
from diffaccel.kernels.norms import NormHook
from diffaccel.kernels.tokens import TOKEN_PATHS, token_sites

# First and last module on the map, and what is beside the path from one to the other.
PATHS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "UNet2DConditionModel": ("conv_in", "conv_out", ()),
    "UNet2DModel": ("conv_in", "conv_out", ()),
    "ControlNetModel": ("conv_in", None, ("controlnet_cond_embedding",)),
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
    wrapped: list[str] = []
    for name, module in network.named_modules():
        if name.startswith(tuple(f"{one}." for one in (*beside, *wrapped))):
            continue
        parent = network.get_submodule(name.rpartition(".")[0])
        inner = getattr(module, "base_layer", module)  # of LoRA, which is hooked as a whole
        if (reason := _refused(name, inner)) is not None:
            raise ValueError(f"{type(network).__name__} has {reason}; sparse edits do not know it")
        if name in beside:
            yield module, BesideHook(engine, name)
        elif isinstance(inner, nn.Conv2d | nn.AvgPool2d):
            wrapped.append(name)
            kind: Kind = "inner"
            if name == entry:
                kind = "entry"
            elif name == leave:
                kind = "exit"
            elif type(parent).__name__ == "Upsample2D":
                kind = "upsampled"
            if kind != "inner" or _pair(inner.kernel_size) != (1, 1) or _pair(inner.stride) != (1, 1):
                yield module, WindowHook(engine, name, kind, _trailing(parent))
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


def _trailing(parent: Any) -> int:
    """`Downsample2D` with padding 0 appends a row and a column of zeros."""
    return int(type(parent).__name__ == "Downsample2D" and parent.use_conv and parent.padding == 0)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
