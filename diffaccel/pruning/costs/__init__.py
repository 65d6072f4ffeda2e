"""What the units of a network cost: multiply-accumulates, parameters, latency; and a table of its layers."""

from diffaccel.pruning.costs.latency import latency_costs
from diffaccel.pruning.costs.layers import Layer, layer_csv, layer_markdown, layer_table
from diffaccel.pruning.costs.linear import macs_costs, parameter_costs
from diffaccel.pruning.costs.table import Costs, planned

__all__ = [
    "Costs",
    "Layer",
    "latency_costs",
    "layer_csv",
    "layer_markdown",
    "layer_table",
    "macs_costs",
    "parameter_costs",
    "planned",
]
