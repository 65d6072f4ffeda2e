"""Heads of an attention: Diffusers' `Attention` (U-Nets, DiT, PixArt, SD3) and `FluxAttention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffaccel.pruning.groups import Group, NotPrunableError, Site
from diffaccel.pruning.parts.constant import Constant
from diffaccel.pruning.parts.layers import plain

INPUTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
OUTPUTS = ("to_out.0", "to_add_out")


def heads(name: str, attn: Any) -> Group:
    """One unit a head: rows of every query, key and value layer, columns of every output layer.

    Never a part of a head: the scale 1 / sqrt(head_dim) and rotary embeddings depend on its width.

    Raises:
        NotPrunableError: if heads are not independent (a norm over all heads, shared keys), or something hangs on them
            (an IP-Adapter, fused projections, a LoRA, a quantised layer, a processor that knows their number).
    """
    layers = {key: attn.get_submodule(key) for key in (*INPUTS, *OUTPUTS) if _has(attn, key)}
    for key, layer in layers.items():
        plain(layer, f"{name}.{key}")
    width = attn.to_q.out_features // attn.heads
    _check(name, attn, width)
    sites = [Site(f"{name}.{key}", "in" if key in OUTPUTS else "out", width) for key in layers]
    return Group(f"{name}.heads", "heads", attn.heads, (name,), tuple(sites), attention=name)


def _has(attn: nn.Module, key: str) -> bool:
    first, _, rest = key.partition(".")
    found = getattr(attn, first, None)
    return found is not None and (not rest or len(found) > int(rest))


def _check(name: str, attn: Any, width: int) -> None:
    if getattr(attn, "fused_projections", False):
        raise NotPrunableError(f"{name} has fused projections; call unfuse_qkv_projections() first")
    if isinstance(attn.processor, nn.Module) and any(True for _ in attn.processor.parameters()):
        raise NotPrunableError(
            f"{name} has a processor with weights ({type(attn.processor).__name__}); unload it first"
        )
    if attn.to_k is None:
        raise NotPrunableError(f"{name} has no keys of its own")
    if getattr(attn, "add_k_proj", None) is not None and getattr(attn, "add_q_proj", None) is None:
        # DeepFloyd IF and Kandinsky: `AttnAddedKVProcessor2_0` shapes its result as wide as its input
        raise NotPrunableError(f"{name} has a processor that needs heads as wide as its input together")
    if attn.to_k.out_features != attn.to_q.out_features:
        raise NotPrunableError(f"{name} shares keys and values among heads")
    for key in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        weight = getattr(getattr(attn, key, None), "weight", None)
        if weight is not None and weight.numel() != width:
            raise NotPrunableError(f"{name}.{key} is a norm over all heads: without one of them the others change")


def set_heads(attn: Any, count: int) -> None:
    """Tell an attention that it has `count` heads; without it most processors go on silently with wrong ones."""
    width = attn.to_q.out_features // count
    attn.heads = count
    attn.inner_dim = count * width
    if hasattr(attn, "inner_kv_dim"):
        attn.inner_kv_dim = count * width
    if hasattr(attn, "sliceable_head_dim"):
        attn.sliceable_head_dim = count


class ConstantAttention(nn.Module):
    """An attention without heads: the biases of its output layers, and its residual connection if it has one."""

    def __init__(self, attn: Any):
        super().__init__()
        self.to_out = nn.ModuleList([Constant(attn.to_out[0])])
        self.to_add_out = None if getattr(attn, "to_add_out", None) is None else Constant(attn.to_add_out)
        self.joint = getattr(attn, "added_kv_proj_dim", None) is not None
        self.residual_connection = getattr(attn, "residual_connection", False)
        self.rescale_output_factor = getattr(attn, "rescale_output_factor", 1.0)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any):
        """As the attention it stands for; of (N, C, H, W) or (N, T, C)."""
        if hidden_states.ndim == 4:
            output = self.to_out[0](hidden_states.movedim(1, -1)).movedim(-1, 1)
        else:
            output = self.to_out[0](hidden_states)
        if self.residual_connection:
            output = output + hidden_states
        output = output / self.rescale_output_factor
        if not self.joint or encoder_hidden_states is None:
            return output
        # Without `to_add_out` (the last block of SD3) nobody looks at the second output.
        return output, encoder_hidden_states if self.to_add_out is None else self.to_add_out(encoder_hidden_states)
