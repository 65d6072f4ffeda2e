"""Energies: what units send on, measured at the layers that they send it through; activation and FLAP share this."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from numpy.typing import NDArray
from torch import Tensor, nn

from diffaccel.pruning.calibration import Calibration, run, still
from diffaccel.pruning.criteria.scores import per_unit
from diffaccel.pruning.gates import check_eager
from diffaccel.pruning.groups import Group


@dataclass
class Moments:
    """Running mean and variance of the input features of a layer, over positions, rows and calls.

    Attributes:
        rows: samples seen, by the weights of their calls.
        count: positions seen, of all rows together, by the same weights.
        mean: (features,) float64, on the CPU.
        spread: (features,) float64, sum of squared distances to the mean.
    """

    rows: float
    count: float
    mean: Tensor
    spread: Tensor

    @property
    def variance(self) -> Tensor:
        """(features,) variance."""
        return self.spread / self.count

    @property
    def square(self) -> Tensor:
        """(features,) mean of the squares."""
        return self.variance + self.mean.square()

    def add(self, x: Tensor, weight: float = 1.0) -> None:
        """Take in x (rows, ..., features), of a call with this weight.

        Merged as in Chan, Golub and LeVeque (1979): the mean of squares minus the squared mean would cancel.
        """
        self.rows += weight * len(x)
        x = x.reshape(-1, x.shape[-1]).float()  # squares of float16 overflow
        n = weight * len(x)
        mean = x.mean(0)
        spread = weight * (x - mean).square().sum(0)
        mean, spread = mean.double().cpu(), spread.double().cpu()  # Metal has no float64
        total, gap = self.count + n, mean - self.mean
        self.spread += spread + gap.square() * self.count * n / total
        self.mean += gap * n / total
        self.count = total


def column_energy(layer: nn.Module) -> Tensor:
    """(in_features,) squared norm of every column of a Linear, or of all that a channel meets in a convolution."""
    squares = layer.weight.detach().float().square()  # type: ignore[operator]
    return squares.transpose(0, 1).flatten(1).double().sum(1)


def moments(model: nn.Module, groups: Sequence[Group], calibration: Calibration) -> dict[str, Moments]:
    """Moments of the input of every layer that has columns of these groups, by the layer's name."""
    names = dict.fromkeys(site.module for group in groups for site in group.sites if site.side == "in")
    found: dict[str, Moments] = {}
    hooks: list[Any] = []
    weight = [1.0]  # of the call that is made
    for name in names:
        layer: Any = model.get_submodule(name)
        zero = torch.zeros(layer.weight.shape[1], dtype=torch.float64)
        found[name] = Moments(0.0, 0.0, zero, zero.clone())
        hooks.append(layer.register_forward_pre_hook(_listen(found[name], weight)))
    _replay(model, calibration, hooks, weight)
    return found


def _listen(moments: Moments, weight: list[float]) -> Callable[..., None]:
    def listen(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if weight[0]:
            moments.add(args[0].movedim(1, -1) if isinstance(layer, nn.Conv2d) else args[0], weight[0])

    return listen


def unit_energy(
    model: nn.Module, group: Group, inputs: dict[str, Moments], of: Callable[[nn.Module, Moments], Tensor]
) -> NDArray[np.float64]:
    """(units,) energy per row that the group's units send on, summed over positions, layers and their outputs.

    `of` gives the part of the input that counts, (in_features,), of a layer and its moments.
    """
    energies = np.zeros(group.units)
    for site in (site for site in group.sites if site.side == "in"):
        layer, x = model.get_submodule(site.module), inputs[site.module]
        if not x.rows:
            continue  # never called: GLIGEN's layers without its boxes
        energies += per_unit(x.count / x.rows * of(layer, x) * column_energy(layer), site, group.units)
    return energies


def change_energy(model: nn.Module, groups: Sequence[Group], calibration: Calibration) -> dict[str, float]:
    """Energy per row of what the modules of groups without sites add to their input, by group name."""
    names = dict.fromkeys(name for group in groups if not group.sites for name in group.modules)
    energies: dict[str, list[float]] = {name: [] for name in names}
    weight = [1.0]  # of the call that is made
    hooks = [
        model.get_submodule(name).register_forward_hook(_watch(name, heard, weight), with_kwargs=True)
        for name, heard in energies.items()
    ]
    _replay(model, calibration, hooks, weight)
    total = sum(call.weight for call in calibration.calls)
    return {
        group.name: sum(sum(energies[name]) for name in group.modules) / total for group in groups if not group.sites
    }


def _watch(name: str, heard: list[float], weight: list[float]) -> Callable[..., None]:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        heard.append(weight[0] * sum(_change(name, before, after) for before, after in _streams(arguments, output)))

    return watch


def _streams(arguments: dict[str, Any], output: Any) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of every stream that goes through a module."""
    if isinstance(output, tuple) and len(output) == 2:  # blocks of SD3 and Flux return the text first
        pairs = [(arguments["encoder_hidden_states"], output[0]), (arguments["hidden_states"], output[1])]
        return [(before, after) for before, after in pairs if after is not None]  # None: the last block of SD3
    return [(next(iter(arguments.values())), output if isinstance(output, Tensor) else output[0])]


def _change(name: str, before: Tensor, after: Tensor) -> float:
    """Squared difference, summed over channels and positions, mean over rows."""
    if after.ndim == 4:
        before = before[:, : after.shape[1]]  # on the way up the skip comes behind the features, and goes with them
    if before.shape != after.shape:
        raise ValueError(f"{name} has no residual connection: it makes {tuple(after.shape)} of {tuple(before.shape)}")
    return float((after.float() - before.float()).square().flatten(1).sum(1).mean())


def _replay(model: nn.Module, calibration: Calibration, hooks: list[Any], weight: list[float]) -> None:
    """Make the calls, each with its weight where the hooks find it, and remove the hooks whatever happens."""
    try:
        check_eager(model)
        with torch.no_grad(), still(model):
            for call in logging.tqdm(calibration.calls, desc="activations"):
                weight[0] = call.weight
                run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
