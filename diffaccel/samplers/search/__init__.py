"""Samplers searched on one's own model: what is fitted, by whom, and what comes of it."""

from diffaccel.samplers.search.api import METHODS, search
from diffaccel.samplers.search.recipe import Entry, Recipe

__all__ = ["METHODS", "Entry", "Recipe", "search"]
