"""Multiply-accumulates that a run has spent, against those of its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from diffaccel.meta import to_meta
from diffaccel.samplers.policy.plan import FULL, Plan

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Report:
    """What the last run cost.

    Attributes:
        pictures: how many were made together.
        calls: calls by name of the network.
        macs: multiply-accumulates of all calls that were made, per picture; both halves of guidance.
        planned: the same of the steps that the plan had for the run.
        full: the same if the pipeline's own network had made every step.
    """

    pictures: int
    calls: dict[str, int]
    macs: float
    planned: float
    full: float

    def __str__(self) -> str:
        together: dict[str, int] = {}
        for name, count in self.calls.items():  # "depth 4, part 9": one depth has maps for each part of time
            together[name.split(",")[0]] = together.get(name.split(",")[0], 0) + count
        calls = ", ".join(f"{count} x {name}" for name, count in together.items())
        share = f"{self.macs / self.full:.1%}" if self.full else "nothing"
        cost = f"{self.macs / 1e9:.3g} GMACs a picture ({self.planned / 1e9:.3g} planned)"
        return f"{calls}: {cost}, {share} of the whole network's"


@dataclass
class Spent:
    """Calls of one run, by network and by the shapes of their arguments.

    Attributes:
        pictures: how many are made together.
        names: networks of the steps that the run makes, by the plan.
        first: index of the first of these steps.
        rows: rows that the first step gave to networks; guidance makes two of each picture.
        calls: of each network and shape: how many, and arguments to count with (without numbers).
    """

    pictures: int = 0
    names: tuple[tuple[str, ...], ...] = ()
    first: int = 0
    rows: int = 0
    calls: dict[tuple[str, Any], tuple[int, _Call]] = field(default_factory=dict)

    @classmethod
    def of_run(cls, plan: Plan, first: int, given: Mapping[str, Any]) -> Spent:
        """For a run that starts at step `first` with these arguments."""
        return cls(_pictures(given), plan.table[first:], first)

    def count(self, step: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call. Costs microseconds: shapes are read, nothing is counted yet."""
        leaves, _ = tree_flatten((args, kwargs))
        key = name, tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))
        times, call = self.calls.get(key) or (0, to_meta((args, kwargs)))
        self.calls[key] = times + 1, call
        if step == self.first:
            self.rows += _rows(call)

    def report(self, count: Callable[[str, _Call], int]) -> Report:
        """What was spent and what the plan says, by `count`: multiply-accumulates of a call of a network.

        The plan's cost is that of its steps with as many rows each as the first one had.

        Raises:
            RuntimeError: if nothing was drawn yet.
        """
        if not self.calls:
            raise RuntimeError("no picture was drawn with this policy yet; call the pipeline first")
        calls: dict[str, int] = {}
        spent = 0
        for (name, _), (times, call) in self.calls.items():
            calls[name] = calls.get(name, 0) + times
            spent += times * count(name, call)
        _, call = max(self.calls.values(), key=lambda entry: _rows(entry[1]))
        a_row = {name: count(name, call) / _rows(call) for name in {FULL, *(n for row in self.names for n in row)}}
        planned = self.rows * sum(a_row[name] / len(row) for row in self.names for name in row)
        full = self.rows * len(self.names) * a_row[FULL]
        return Report(self.pictures, calls, spent / self.pictures, planned / self.pictures, full / self.pictures)


def latents(given: Mapping[str, Any]) -> Tensor:
    """What a network is given to denoise, among its arguments by name."""
    return given["sample"] if "sample" in given else given["hidden_states"]


def _rows(call: _Call) -> int:
    args, kwargs = call
    return len(args[0] if args else latents(kwargs))


def _pictures(given: Mapping[str, Any]) -> int:
    """Pictures of a batch. Guidance in one call has every picture's latents twice or more, one copy after the other.

    Pictures from the same noise, without guidance, would be taken for copies.
    """
    sample = latents(given)
    rows = len(sample)
    periods = (n for n in range(1, rows) if rows % n == 0)
    return next((n for n in periods if torch.equal(sample[n:], sample[:-n])), rows)
