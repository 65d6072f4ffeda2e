"""Exits without training: affine maps by least squares, and what leaving early costs at each noise level, measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from diffaccel.cost import denoisers, macs
from diffaccel.meta import meta_copy, to_meta
from diffaccel.pruning.calibration import Calibration, Call, Prompt, record, run, still
from diffaccel.samplers.policy.attach import attached
from diffaccel.samplers.policy.clock import first
from diffaccel.samplers.policy.exits.depth import exits_of, layers, shallow, told_scale
from diffaccel.samplers.policy.exits.linear import LeastSquares, LinearExit
from diffaccel.samplers.policy.exits.schedule import DepthSchedule, best
from diffaccel.samplers.policy.exits.tap import listening

_MOST_DEPTHS = 8
_CALLS_PER_STEP = 8  # at most: guidance in separate calls, solvers of several stages
Key = tuple[int, int]  # depth, part of time


@dataclass(frozen=True)
class FittedExits:
    """Affine maps of all exits, and what each depth costs and saves at each noise level.

    Attributes:
        maps: by (depth, part of time).
        errors: of each part of time by depth: squared error of the prediction against the whole network's, weighted by
            how much an error there moves the end of the trajectory (`influence`); what the steps in this part add to
            the mean over the trajectory. On prompts that no map was fitted on. 0 for the whole network.
        costs: likewise, share of a trajectory's multiply-accumulates.
        layers: depth of the whole network.
        train_timesteps: end of the time that the parts divide.
    """

    maps: dict[Key, LinearExit]
    errors: tuple[dict[int, float], ...]
    costs: tuple[dict[int, float], ...]
    layers: int
    train_timesteps: float = 1000.0

    def schedule(self, target: float) -> DepthSchedule:
        """The depths with the least sum of errors at `target` of the multiply-accumulates, in (0, 1].

        Errors are taken to add up: draw pictures with it before you trust it.

        Raises:
            ValueError: if the exits do not save so much, or for a target that is no share.
        """
        if not 0 < target <= 1:
            raise ValueError(f"the target is a share of the multiply-accumulates, above 0 and up to 1, not {target}")
        return DepthSchedule(best(self.errors, self.costs, target)[0], self.layers, self.train_timesteps, mapped=True)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {
            f"{depth}.{part}.{name}": value.contiguous()
            for (depth, part), exit_map in self.maps.items()
            for name, value in exit_map.state_dict().items()
        }
        facts = {name: getattr(self, name) for name in ("layers", "errors", "costs", "train_timesteps")}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        save_file(tensors, partial, {"diffaccel_exits": json.dumps(facts)})
        partial.rename(target)

    @classmethod
    def load(cls, path: str | Path) -> FittedExits:
        """Read what `save` wrote.

        Raises:
            ValueError: for another file.
        """
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get("diffaccel_exits")
            if told is None:
                raise ValueError(f"{path} holds no exits; give a file that FittedExits.save wrote")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(told)
        keys = sorted({(int(d), int(p)) for d, p, _ in (name.split(".") for name in weights)})
        maps = {(d, p): LinearExit(weights[f"{d}.{p}.weight"], weights[f"{d}.{p}.bias"]) for d, p in keys}
        errors, costs = (
            tuple({int(d): v for d, v in part.items()} for part in facts[name]) for name in ("errors", "costs")
        )
        return cls(maps, errors, costs, facts["layers"], facts["train_timesteps"])


def fit_exits(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    parts: int = 10,
    steps: int = 20,
    depths: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    **arguments: Any,
) -> FittedExits:
    """Fit an affine map for every depth and noise level, and measure what it loses: no training, no gradients.

    Every other prompt is drawn to fit, the others to measure. The map at depth n takes the features before layer n to
    those after the last one (in a U-Net: to those that come back up to this level), by ridge regression over all tokens
    of all steps in one part of time.

    Args:
        pipe: a pipeline with a DiT, PixArt, SD3, Flux or U-Net, and the scheduler it will be used with.
        prompts: at least two texts, class numbers, or mappings of arguments; some twenty, unlike each other.
        parts: equal parts of the training time, each with maps of its own.
        steps: of each trajectory; at least as many as parts, or parts without a step keep the whole network.
        depths: that may be chosen; default: all, of more than eight every other, every third, ...
        guidance_scale: of the pipeline; None: its default.
        seed: of the first prompt's noise.
        arguments: further ones for every run of the pipeline, such as `height`.

    Raises:
        TypeError: for a network of another class.
        ValueError: with fewer than two prompts, for a depth that there is not, or numbers below 1.
    """
    model: Any = next(iter(denoisers(pipe).values()))
    whole = layers(model)
    chosen = _depths(whole, depths)
    if attached(pipe) is not None:
        raise ValueError("the pipeline has a policy; take it off before exits are fitted: handle.remove()")
    for depth in chosen:
        shallow(model, depth, nn.Identity())  # what cannot be left at this depth says so now
    if next(model.parameters()).is_meta:
        raise ValueError("the network's weights are offloaded; fit the exits before enable_sequential_cpu_offload()")
    if parts < 1:
        raise ValueError(f"the training time has one part or more, not {parts}")
    if len(prompts) < 2 or isinstance(prompts, str):
        raise ValueError("exits are fitted on some prompts and measured on others; give a list of two or more")

    def calls(few: Sequence[Prompt], start: int) -> Calibration:
        arguments_ = {"steps": steps, "guidance_scale": guidance_scale, **arguments}
        return record(pipe, few, calls=len(few) * steps * _CALLS_PER_STEP, seed=seed + start, **arguments_)

    end = pipe.scheduler.config.get("num_train_timesteps", 1000)
    schedule, scale = DepthSchedule((whole,) * parts, whole, end), told_scale(model)
    fitted = _fit(model, chosen, _by_part(calls(prompts[::2], 0), schedule, scale))
    measured = list(_by_part(calls(prompts[1::2], len(prompts)), schedule, scale))
    return FittedExits(fitted, *_measure(model, fitted, measured, parts, whole), whole, end)


def _depths(whole: int, depths: Sequence[int] | None) -> list[int]:
    if depths is None:
        return list(range(1, whole, -(-whole // _MOST_DEPTHS)))
    if not depths or not all(1 <= depth < whole for depth in depths):
        raise ValueError(f"exits lie at depths 1 to {whole - 1} of this network, not {list(depths)}")
    return sorted(set(depths))


def _by_part(calibration: Calibration, schedule: DepthSchedule, scale: float) -> Iterator[tuple[int, Call]]:
    for call in calibration.calls:
        timestep = call.kwargs["timestep"] if "timestep" in call.kwargs else call.args[1]
        yield schedule.part(first(timestep) / scale), call


@torch.no_grad()
def _fit(model: Any, depths: Sequence[int], calls: Iterable[tuple[int, Call]]) -> dict[Key, LinearExit]:
    family = exits_of(model)
    sums: dict[Key, LeastSquares] = {}
    taps = {(depth, side): tap for depth in depths for side, tap in enumerate(family.taps(model, depth))}
    with still(model), listening(model, taps) as heard:
        for part, call in calls:
            run(model, call)
            for depth in depths:
                pair = heard[depth, 0], heard[depth, 1]
                sums.setdefault((depth, part), LeastSquares()).add(*pair, weight=call.weight)
    return {key: total.solve(family.residual(model)) for key, total in sums.items()}


@torch.no_grad()
def _measure(
    model: Any, maps: dict[Key, LinearExit], calls: Sequence[tuple[int, Call]], parts: int, whole: int
) -> tuple[tuple[dict[int, float], ...], tuple[dict[int, float], ...]]:
    """Errors and costs of every part of time by depth; see `FittedExits`."""
    errors: list[dict[int, float]] = [{whole: 0.0} for _ in range(parts)]
    costs: list[dict[int, float]] = [{whole: 0.0} for _ in range(parts)]
    _, example = calls[0]
    shares = {whole: 1.0}
    counted = macs(meta_copy(model), *to_meta(example.args), **to_meta(example.kwargs))
    with still(model):
        for part, call in calls:
            costs[part][whole] += 1 / len(calls)
            expected = run(model, call)
            for depth in (depth for depth, other in maps if other == part):
                leaving = shallow(model, depth, maps[depth, part])
                if depth not in shares:
                    shares[depth] = (
                        macs(meta_copy(leaving), *to_meta(example.args), **to_meta(example.kwargs)) / counted
                    )
                error = call.weight * float((run(leaving, call) - expected).float().square().mean()) / len(calls)
                errors[part][depth] = errors[part].get(depth, 0.0) + error
                costs[part][depth] = costs[part].get(depth, 0.0) + shares[depth] / len(calls)
    return tuple(errors), tuple(costs)
