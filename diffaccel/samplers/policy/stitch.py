"""T-Stitch: a small network for the first steps, the large one for the rest (Pan et al., arXiv:2402.14167)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from diffusers.utils import logging
from torch import nn

from diffaccel.samplers.policy.attach import Handle, attach
from diffaccel.samplers.policy.compatible import check_network, check_pipeline
from diffaccel.samplers.policy.plan import FULL, Grid, Plan

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Stitch:
    """Small networks first, from the smallest to the largest; then the pipeline's own.

    Attributes:
        names: of the small networks, in the order of their turn.
        fractions: share of the steps that each one makes. The first k networks make floor(steps x the sum of their
            shares) steps: the speed is that of the plan, whatever the schedule.
        timesteps: instead of shares, the lowest timestep that each one sees: it follows the noise level, whatever the
            number of steps. The paper's DiT code does this (with 1000 x (1 - fraction)), its Stable Diffusion code
            counts steps; on Karras or shifted schedules the two differ.
    """

    names: tuple[str, ...]
    fractions: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()

    def plan(self, grid: Grid, conditioning: Mapping[str, Any]) -> Plan:
        """The steps that image-to-image leaves out count: they were the small networks'."""
        if self.timesteps:
            return Plan.same([self._at(time) for time in grid.training_times()])
        plan = [FULL] * len(grid)
        begin = 0
        for name, share in zip(self.names, _sums(self.fractions), strict=True):
            end = math.floor(share * len(grid) + 1e-9)  # 0.1 + 0.2 is a little more than 0.3, 0.7 + 0.1 less than 0.8
            plan[begin:end] = [name] * (end - begin)
            begin = end
        if begin == 0 and sum(self.fractions) > 0:
            logger.warning(
                f"{sum(self.fractions):g} of {len(grid)} steps is less than one; small networks make none of this run"
            )
        return Plan.same(plan)

    def _at(self, time: float) -> str:
        return next((name for name, low in zip(self.names, self.timesteps, strict=True) if time >= low), FULL)


def stitch(
    pipe: Any,
    small: Any,
    fraction: float | Sequence[float] | None = None,
    *,
    timestep: float | Sequence[float] | None = None,
    offload: bool = False,
) -> Handle:
    """Let a smaller network make the first steps: `handle = diffaccel.stitch(pipe, small, fraction=0.4)`.

    At much noise only the coarse layout is decided, which a small network does nearly as well. It must speak the
    language of the large one: same latents, same prediction type and noise schedule, same text encoder, and best the
    same training data (a distilled, pruned or smaller model of the family).

    Args:
        pipe: the pipeline whose network is the large one; it stays as it is but for a hook.
        small: a network, or a pipeline with one: then scheduler, text encoder and scale of the latents are compared
            too. Several, from the smallest to the largest, as a list. It is moved to where the large one works, and
            cast to its type, for good.
        fraction: share of the steps for the small network, in [0, 1]; default 0.4. Of several, one share each.
        timestep: instead, the timestep (noise level) down to which the small one is used, of those that schedulers
            count, 1000 = noise. Of several, one each, falling.
        offload: see `attach`.

    Returns:
        A handle: `handle.report()`, `handle.compile()`, `handle.remove()`.

    Raises:
        TypeError: if `small` is neither a network nor a pipeline, or a network of another kind.
        ValueError: for shares out of range, or networks that do not fit.
    """
    if fraction is not None and timestep is not None:
        raise ValueError("give fraction (share of the steps) or timestep (noise level), not both")
    fractions = _numbers("fraction", 0.4 if fraction is None and timestep is None else fraction)
    timesteps = _numbers("timestep", timestep)
    networks = small_networks(pipe, small)
    check_numbers(len(networks), fractions, timesteps)
    return attach(pipe, Stitch(tuple(networks), fractions, timesteps), networks, offload=offload)


def small_networks(pipe: Any, small: Any) -> dict[str, nn.Module]:
    """The networks in `small`, by name, after a look if they fit; see `stitch`."""
    several = small if isinstance(small, list | tuple) else [small]
    if not several:
        raise ValueError("there is no small network; give one, or a list of some")
    networks = {}
    for i, one in enumerate(several):
        name = "small" if len(several) == 1 else f"small {i + 1}"
        networks[name] = one if isinstance(one, nn.Module) else check_pipeline(pipe, one)
        check_network(pipe, networks[name])
    return networks


def _numbers(name: str, value: float | Sequence[float] | None) -> tuple[float, ...]:
    several = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(number, Real) for number in several):
        raise TypeError(f"{name} is a number, or a list with one for each small network, not {value!r}")
    return tuple(map(float, several))  # type: ignore[arg-type]


def _sums(shares: tuple[float, ...]) -> list[float]:
    return [sum(shares[: i + 1]) for i in range(len(shares))]


def check_numbers(count: int, fractions: tuple[float, ...], timesteps: tuple[float, ...]) -> None:
    """Raise ValueError for shares or timesteps that are out of range, or not as many as networks."""
    given = fractions or timesteps
    if len(given) != count:
        raise ValueError(f"give one fraction or timestep for each small network: {count}, not {len(given)}")
    if fractions and not (min(fractions) >= 0 and sum(fractions) <= 1 + 1e-9):
        raise ValueError(f"the fraction of steps lies between 0 and 1, all of them together too, not {list(fractions)}")
    if timesteps and 0 < max(timesteps) <= 1:
        raise ValueError(f"timesteps count to 1000 here, not to 1; write timestep={1000 * max(timesteps):g}")
    if timesteps and not (all(time >= 0 for time in timesteps) and sorted(timesteps, reverse=True) == list(timesteps)):
        raise ValueError(f"timesteps fall from network to network and are not negative, unlike {list(timesteps)}")
