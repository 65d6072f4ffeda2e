"""Heads and neurons of a `FluxSingleTransformerBlock`, whose one output layer has the columns of both."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffaccel.pruning.groups import Group, Site
from diffaccel.pruning.parts.attention import heads
from diffaccel.pruning.parts.feed_forward import step_of
from diffaccel.pruning.parts.layers import plain


def heads_and_neurons(name: str, block: Any) -> list[Group]:
    """Columns of `proj_out`: first those of the heads, then those of the neurons.

    Raises:
        NotPrunable: see `attention.heads`.
    """
    plain(block.proj_mlp, f"{name}.proj_mlp")
    plain(block.proj_out, f"{name}.proj_out")
    count = block.proj_mlp.out_features
    sites = (Site(f"{name}.proj_mlp", "out"), Site(f"{name}.proj_out", "in", 1, (block.proj_out.in_features - count,)))
    neurons = Group(f"{name}.neurons", "neurons", count, (name,), sites, step_of(count))
    if isinstance(block.attn, NoHeads):
        return [neurons]
    inner = heads(f"{name}.attn", block.attn)
    columns = Site(f"{name}.proj_out", "in", inner.sites[0].size)
    return [
        Group(inner.name, "heads", inner.units, (name,), (*inner.sites, columns), attention=inner.attention),
        neurons,
    ]


def set_widths(block: Any) -> None:
    """Tell the block of its new widths (the second is read by tensor parallelism)."""
    block.mlp_hidden_dim = block.proj_mlp.out_features
    block.proj_out._tp_packed_row_blocks = [block.proj_out.in_features - block.mlp_hidden_dim, block.mlp_hidden_dim]


class NoHeads(nn.Module):
    """An attention without heads and without an output layer: no features."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(N, T, C) -> (N, T, 0)."""
        return hidden_states[..., :0]
