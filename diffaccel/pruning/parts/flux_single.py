"""Heads and neurons of a `FluxSingleTransformerBlock`, whose one output layer has the columns of both."""

from __future__ import annotations

from typing import Any

from diffaccel.pruning.groups import Group, Site
from diffaccel.pruning.parts.attention import heads
from diffaccel.pruning.parts.constant import NoFeatures
from diffaccel.pruning.parts.feed_forward import step_of
from diffaccel.pruning.parts.layers import plain


def heads_and_neurons(name: str, block: Any) -> list[Group]:
    """Columns of `proj_out`: first those of the heads, then those of the neurons.

    Raises:
        NotPrunableError: see `attention.heads`.
    """
    groups = []
    if not isinstance(block.attn, NoFeatures):
        inner = heads(f"{name}.attn", block.attn)
        sites = (*inner.sites, Site(f"{name}.proj_out", "in", inner.sites[0].size))
        groups.append(Group(inner.name, "heads", inner.units, (name,), sites, attention=inner.attention))
    if not isinstance(block.proj_mlp, NoFeatures):
        plain(block.proj_mlp, f"{name}.proj_mlp")
        plain(block.proj_out, f"{name}.proj_out")
        count = block.proj_mlp.out_features
        columns = Site(f"{name}.proj_out", "in", 1, (block.proj_out.in_features - count,))
        sites = (Site(f"{name}.proj_mlp", "out"), columns)
        groups.append(Group(f"{name}.neurons", "neurons", count, (name,), sites, step_of(count)))
    return groups


def set_widths(block: Any) -> None:
    """Tell the block of its new widths (the second is read by tensor parallelism)."""
    block.mlp_hidden_dim = getattr(block.proj_mlp, "out_features", 0)
    columns = getattr(block.proj_out, "in_features", 0)
    block.proj_out._tp_packed_row_blocks = [columns - block.mlp_hidden_dim, block.mlp_hidden_dim]
