"""What can be removed from a network: units, the groups they come in, and the rows and columns that go with them.

A *unit* is the smallest thing whose removal leaves a working network: one attention head, one neuron of a feed-forward
layer, one GroupNorm group of a ResNet's inner channels, one block. A *group* holds the units of one place; they are
interchangeable in cost. A unit of a width group owns rows of some layers and columns of others. Where it owns columns,
the input of that layer multiplied by zero gives what the network computes without the unit: that is how masks work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

WIDTH = ("heads", "neurons", "channels")
DEPTH = ("block", "layer", "transformer", "resnet", "mid_block")


@dataclass(frozen=True)
class Site:
    """Features of one layer that belong to the units of a group.

    Unit u owns the features `start + u * size` up to `start + (u + 1) * size` (exclusive), for every start.

    Attributes:
        module: name of a Linear, Conv2d or GroupNorm in the network.
        side: "out": rows of the weight and entries of the bias; "in": columns of the weight.
        size: features of one unit.
        starts: where unit 0 begins; two starts for the halves of a GEGLU or of a scale and shift.
    """

    module: str
    side: Literal["out", "in"]
    size: int = 1
    starts: tuple[int, ...] = (0,)

    def features(self, units: Iterable[int]) -> list[int]:
        """Features of `units`, ascending if the units are."""
        units = list(units)
        return [start + unit * self.size + i for start in self.starts for unit in units for i in range(self.size)]


@dataclass(frozen=True)
class Group:
    """Units of one place of a network.

    Attributes:
        name: unique in the network: a module's name, followed by the kind for groups of width.
        kind: of width: "heads", "neurons", "channels" (units: GroupNorm groups). Of depth, always one unit:
            "block" (a transformer block), "layer" (a layer of a U-Net stage with its partner on the way up),
            "transformer" (a `Transformer2DModel`), "resnet" (the body of a ResNet, its shortcut stays), "mid_block".
        units: number of units.
        modules: names of the modules that units of width live in (one, it holds all sites), or that go with the depth.
        sites: rows and columns of the units. Empty for modules that are left out whole.
        step: units are removed in multiples of this many, so that matrix sizes stay good for the hardware.
        attention: name of the module whose softmax(Q K^T) V shrinks with the units; "" if there is none.
    """

    name: str
    kind: str
    units: int
    modules: tuple[str, ...]
    sites: tuple[Site, ...] = ()
    step: int = 1
    attention: str = ""

    def contains(self, other: Group) -> bool:
        """Whether removing this group's module takes all of `other` along."""
        return (
            self.kind in DEPTH
            and self.name != other.name
            and all(any(_inside(inner, outer) for outer in self.modules) for inner in other.modules)
        )


def _inside(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer + ".")


@dataclass(frozen=True)
class Groups:
    """Groups of a network, by name, and what cannot be removed, with the reason.

    Attributes:
        found: groups by name, in the order of the network.
        refused: reason by name of a module.
    """

    found: dict[str, Group]
    refused: dict[str, str] = field(default_factory=dict)

    def of(self, *kinds: str) -> list[Group]:
        """Groups of these kinds, in the order of the network.

        Raises:
            ValueError: if a kind is not known.
        """
        if unknown := [kind for kind in kinds if kind not in WIDTH + DEPTH]:
            raise ValueError(f"unknown kind {unknown[0]!r}; use {', '.join(WIDTH)} (width), {', '.join(DEPTH)} (depth)")
        return [group for group in self.found.values() if group.kind in kinds]


class NotPrunableError(ValueError):
    """A module whose parts cannot be removed exactly; the message says why."""
