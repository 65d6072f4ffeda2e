"""Budgets: which units go, so that the network costs no more than a share of what it did."""

from diffaccel.pruning.budgets.allocation import allocate

__all__ = ["allocate"]
