"""Which network runs at which step: decided once before the loop, looked up in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

FULL = "full"  # the pipeline's own network


@dataclass(frozen=True)
class Grid:
    """The steps of one run of a pipeline.

    Attributes:
        timesteps: of the scheduler, one a step, from noise to data. A scheduler of second order (Heun) has an entry for
            each network call.
        first: index of the first step that is made; not 0 in image-to-image, which leaves out the noisiest.
    """

    timesteps: tuple[float, ...]
    first: int = 0

    def __len__(self) -> int:
        """Steps of the whole trajectory, those before `first` included."""
        return len(self.timesteps)


@dataclass(frozen=True)
class Plan:
    """Names of the networks of one run.

    Attributes:
        table: for each step of the grid a name for each sample of the batch; one name stands for all samples.
    """

    table: tuple[tuple[str, ...], ...]

    @classmethod
    def same(cls, names: Sequence[str]) -> Plan:
        """One name a step, for all samples."""
        return cls(tuple((name,) for name in names))

    def __call__(self, step: int, sample: int = 0) -> str:
        """Name of the network for a sample, numbered within the pictures of the batch, at a step of the grid."""
        row = self.table[step]
        return row[sample % len(row)]

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self.table)

    def names(self) -> list[str]:
        """All networks that are named, in the order of their first step."""
        return list(dict.fromkeys(name for row in self.table for name in row))


class Policy(Protocol):
    """A rule that plans runs. A plain function `(grid, conditioning) -> Plan` is not enough: a policy has a name."""

    def plan(self, grid: Grid, conditioning: Mapping[str, Any]) -> Plan:
        """Plan one run.

        Args:
            grid: its steps.
            conditioning: arguments of the first call of the network by name: sample, text embeddings, class labels.
        """
        ...
