"""What happens at each network call while a reference is recorded, and while it is edited."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from diffaccel.cost import drain
from diffaccel.kernels.cache import Key
from diffaccel.kernels.engine import Engine, Handle
from diffaccel.kernels.region import Region
from diffaccel.samplers.policy.clock import Clock

Forward = Callable[..., Any]
Change = Callable[[int, Tensor], Tensor]  # step, the network's output -> its output


class Follower:
    """Tells which step, and which call in it, a network call of the pipeline is."""

    def __init__(self, pipe: Any):
        self._pipe, self._clock = pipe, Clock()
        self._step, self._number = -1, 0

    @property
    def steps(self) -> int:
        """Of the run."""
        return len(self._clock.times)

    def restart(self) -> None:
        """Before a run."""
        self._clock, self._step = Clock(), -1

    def key(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """Step, and number of the call in it."""
        names = list(inspect.signature(type(network).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self._clock.new_run(self._pipe.scheduler)
        step = self._clock.step(self._pipe.scheduler, given["timestep"])
        self._number = self._number + 1 if step == self._step else 0
        self._step = step
        return step, self._number


class Reference:
    """What is known of a finished run.

    Attributes:
        outputs: of the network, by step and number of the call.
        seconds: of each network call.
    """

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.pending: dict[tuple[int, int], Tensor] = {}
        self.seconds: list[float] = []

    def accept(self) -> None:
        """Make what the last edit gave the reference."""
        self.outputs.update(self.pending)
        self.pending = {}


class Recording:
    """Runs the network as it is, and keeps outputs and features.

    Args:
        handle: of the network.
        follower: of the pipeline.
        reference: to fill.
        change: of the outputs that the pipeline gets, such as for a run that leads to a known picture.
    """

    def __init__(self, handle: Handle, follower: Follower, reference: Reference, change: Change | None = None):
        self.handle, self.follower, self.reference, self.change = handle, follower, reference, change

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One network call."""
        engine = self.handle.engine
        step, number = self.follower.key(self.handle.network, args, kwargs)
        start = now()
        if engine.config.reference == "record":
            with engine.running("record", engine.cache.new((step, number))):
                result = forward(*args, **kwargs)
            engine.cache.check((number + 1) * self.follower.steps)
        elif self.change is None:
            with engine.running("off"):
                result = forward(*args, **kwargs)
        else:  # the picture is known, and no features are asked for
            result = _returned(self._blank(args, kwargs), kwargs)
        self.reference.seconds.append(now() - start)
        output = output_of(result)
        if self.change is not None:
            output = self.change(step, output)
            result = with_output(result, output)
        self.reference.outputs[step, number] = output.detach()
        return result

    def _blank(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Zeros in the shape of the network's output."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.handle.engine.input_size = (x.shape[-2], x.shape[-1])
        return x.new_zeros(len(x), self.handle.network.config.out_channels, *x.shape[2:])


class Editing:
    """Replays the reference up to a step, and from there computes the region alone.

    Args:
        handle: of the network.
        follower: of the pipeline.
        reference: of the run that is edited.
        mask: bool, (masks, rows, columns), at the picture's resolution.
        start: first step that is computed.
        change: of the reference's outputs, inside of the mask, before `start`.
        dense: run the whole network in every step, for comparison.
    """

    def __init__(
        self,
        handle: Handle,
        follower: Follower,
        reference: Reference,
        mask: Any,
        start: int,
        change: Change | None = None,
        dense: bool = False,
    ):
        self.handle, self.follower, self.reference, self.mask = handle, follower, reference, mask
        self.start, self.change = start, change
        self.dense = dense or handle.engine.config.exactness == "strict"
        self.calls: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {}
        self.probes: list[tuple[int, int, float]] = []
        self.region: Region | None = None
        self._margin = handle.engine.config.margin

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One network call."""
        step, number = key = self.follower.key(self.handle.network, args, kwargs)
        if key not in self.reference.outputs:
            raise ValueError(
                f"the reference has no network call {number + 1} at step {step + 1}; an edit has the reference's "
                "number of steps, guidance and pictures"
            )
        known = self.reference.outputs[key]
        rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        if rows != len(known):
            raise ValueError(
                f"the reference was made with batches of {len(known)}, and the edit has {rows}; keep the number of "
                "pictures, and guidance on or off as it was"
            )
        if step < self.start:
            self.calls["replayed"] += 1
            new = known if self.change is None else self.composed(self.change(step, known), known)
            self.reference.pending[key] = new
            return _returned(new, kwargs)
        result, how = self._computed(key, forward, args, kwargs)
        self.calls[how] += 1
        new = self.composed(output_of(result), known)
        self.reference.pending[key] = new
        return with_output(result, new)

    def composed(self, new: Tensor, known: Tensor) -> Tensor:
        """`new` in the mask, `known` outside."""
        return torch.where(self._inside(new), new, known.to(new))

    def _computed(self, key: tuple[int, int], forward: Forward, args: Any, kwargs: Any) -> tuple[Any, str]:
        engine = self.handle.engine
        step, number = key
        if self.dense:
            return self._timed("dense", forward, args, kwargs, "off")
        if engine.config.reference == "self":
            key = ("self", number)  # type: ignore[assignment]
            if (step - self.start) % engine.config.refresh == 0 or key not in engine.cache:
                return self._timed("dense", forward, args, kwargs, "record", engine.cache.new(key))
        if self.region is None:
            self.region = self.handle.region(self.mask, self._margin)
        if engine.config.exactness == "bounded" and step in (self.start, (self.start + self.follower.steps) // 2):
            return self._probed(key, step, forward, args, kwargs)
        if self.region.dense:
            return self._whole(key, forward, args, kwargs)
        return self._timed("sparse", forward, args, kwargs, "sparse", engine.cache[key], self.region)

    def _whole(self, key: Key, forward: Forward, args: Any, kwargs: Any) -> tuple[Any, str]:
        """The region is too large to be worth it."""
        engine: Engine = self.handle.engine
        if engine.config.reference == "self":
            return self._timed("dense", forward, args, kwargs, "off")
        return self._timed("dense", forward, args, kwargs, "record", engine.cache.offer(key))

    def _probed(self, key: Key, step: int, forward: Forward, args: Any, kwargs: Any) -> tuple[Any, str]:
        """Grow the margin until the sparse network is near enough to the dense one; the dense result is used."""
        engine = self.handle.engine
        truth, _ = self._timed("probe", forward, args, kwargs, "off")
        true = output_of(truth)
        inside = self._inside(true).expand_as(true)
        while True:
            assert self.region is not None
            if self.region.dense:
                return self._whole(key, forward, args, kwargs)
            near, _ = self._timed("sparse", forward, args, kwargs, "sparse", engine.cache[key], self.region)
            error = float((output_of(near) - true)[inside].norm() / true[inside].norm())
            self.probes.append((step, self._margin, error))
            if error <= engine.config.tolerance:
                return truth, "dense"
            self._margin = max(1, 2 * self._margin)
            self.region = self.handle.region(self.mask, self._margin)

    def _timed(self, how: str, forward: Forward, args: Any, kwargs: Any, *running: Any) -> tuple[Any, str]:
        start = now()
        with self.handle.engine.running(*running):
            result = forward(*args, **kwargs)
        self.seconds.setdefault(how, []).append(now() - start)
        return result, how

    def _inside(self, output: Tensor) -> Tensor:
        return self.handle.inside(self.mask, output)


def output_of(result: Any) -> Tensor:
    """The network's output in what it returns."""
    return result if isinstance(result, Tensor) else result[0]


def _returned(output: Tensor, kwargs: dict[str, Any]) -> Any:
    """As networks return it."""
    return (output,) if kwargs.get("return_dict") is False else Transformer2DModelOutput(output)


def with_output(result: Any, output: Tensor) -> Any:
    """What the network returned, with another output."""
    if isinstance(result, Tensor):
        return output
    if isinstance(result, tuple):
        return (output, *result[1:])
    return type(result)(output)


def now() -> float:
    """Seconds, after everything that was sent to a device is done."""
    drain()
    return time.perf_counter()
