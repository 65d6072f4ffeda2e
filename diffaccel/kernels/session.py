"""What happens at each network call while a reference is recorded; `Editing` is for edits of it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from diffaccel.cost import drain
from diffaccel.kernels.engine import Handle
from diffaccel.kernels.latents import unscaled
from diffaccel.kernels.tokens import token_grid
from diffaccel.samplers.policy.clock import Clock

Forward = Callable[..., Any]
Change = Callable[[int, Tensor, Tensor], Tensor]  # step, output, how far the state moved -> the changed output


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
        self._clock.new_run(self._pipe.scheduler)
        step = self._clock.step(self._pipe.scheduler, given_to(network, args, kwargs)["timestep"])
        self._number = self._number + 1 if step == self._step else 0
        self._step = step
        return step, self._number

    def state(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The scheduler's state at this call, with what the network sees besides (masks) behind it."""
        return unscaled(self._pipe.scheduler, seen(args, kwargs), given_to(network, args, kwargs)["timestep"])


class Reference:
    """What is known of a finished run.

    Attributes:
        outputs: of the network, by step and number of the call.
        states: that it was called with; see `Follower.state`.
        pending: output and state of each call of the last edit, until it is accepted.
        seconds: of each network call.
    """

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.states: dict[tuple[int, int], Tensor] = {}
        self.pending: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.seconds: list[float] = []

    def accept(self) -> None:
        """Make what the last edit gave the reference."""
        for key, (output, state) in self.pending.items():
            self.outputs[key], self.states[key] = output, state
        self.pending = {}


class Recording:
    """Runs the network as it is, and keeps outputs and features.

    Args:
        handle: of the network.
        follower: of the pipeline.
        reference: to fill.
        change: of zeros, to the outputs that the pipeline gets instead: for a run that leads to a known picture.
    """

    def __init__(self, handle: Handle, follower: Follower, reference: Reference, change: Change | None = None):
        self.handle, self.follower, self.reference, self.change = handle, follower, reference, change
        self._begin = 0

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One network call."""
        engine, config = self.handle.engine, self.handle.engine.config
        step, number = self.follower.key(self.handle.network, args, kwargs)
        state = self.follower.state(self.handle.network, args, kwargs)
        if not self.reference.outputs:
            self._begin = step
        start = now()
        if config.reference == "record" and config.exactness != "strict":
            with engine.running("record", engine.cache.new((step, number))):
                result = forward(*args, **kwargs)
            engine.cache.check((number + 1) * (self.follower.steps - self._begin))
        elif self.change is None:
            with engine.running("off"):
                result = forward(*args, **kwargs)
        else:  # the picture is known, and no features are asked for
            result = returned(self._blank(args, kwargs), kwargs)
        self.reference.seconds.append(now() - start)
        output = output_of(result)
        if self.change is not None:
            output = self.change(step, torch.zeros_like(output), state)
            result = with_output(result, output)
        self.reference.outputs[step, number] = output.detach()
        self.reference.states[step, number] = state.detach()
        return result

    def _blank(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Zeros in the shape of the network's output."""
        x, config = seen(args, kwargs), cast(Any, self.handle.network.config)
        channels: int = config.out_channels or config.in_channels
        if x.ndim == 4:
            return x.new_zeros(len(x), channels, *x.shape[2:])
        self.handle.engine.input_size = token_grid(kwargs["img_ids"])  # as no call of the network tells it
        return x.new_zeros(*x.shape[:2], channels)


def seen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a network sees, its first tensor."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def given_to(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a network call by name."""
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def output_of(result: Any) -> Tensor:
    """The network's output in what it returns."""
    return result if isinstance(result, Tensor) else result[0]


def returned(output: Tensor, kwargs: dict[str, Any]) -> Any:
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
