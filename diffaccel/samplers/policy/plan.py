"""Which network runs at which step: decided once before the loop, looked up in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

FULL = "full"  # the pipeline's own network
_OTHER_UNITS = 2.0  # EDM's largest timestep is log(80) / 4, SCM's pi / 2


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

    def training_times(self) -> tuple[float, ...]:
        """The timesteps, if they are those of the training, 0 to about 1000.

        Raises:
            ValueError: for a scheduler that counts in something else: EDM's count log sigma / 4, SCM's radians.
        """
        if self.timesteps and (max(self.timesteps) <= _OTHER_UNITS or min(self.timesteps) < -1):
            raise ValueError(
                f"this scheduler counts from {self.timesteps[0]:.4g} to {self.timesteps[-1]:.4g}; a policy by timestep "
                "needs one that counts in training timesteps, 1000 to 0, such as Euler or DPM-Solver++"
            )
        return self.timesteps

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
    """A rule that plans runs."""

    def plan(self, grid: Grid, conditioning: Mapping[str, Any]) -> Plan:
        """Plan one run.

        Args:
            grid: its steps.
            conditioning: arguments of the first call of the network by name: sample, text embeddings, class labels.
        """
        ...
