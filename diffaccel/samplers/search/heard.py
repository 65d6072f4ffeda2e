"""One step of a stock pipeline, listened to: what its network is given, and what its scheduler."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.eval.reference import pair_generator
from diffaccel.samplers.scheduler import SolverScheduler


@dataclass(frozen=True)
class NetworkCall:
    """One call of the network: its arguments and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def places(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        """Where the sample is, and the time: ("args", position) or ("kwargs", name)."""
        sample = ("args", 0) if self.args else ("kwargs", "sample" if "sample" in self.kwargs else "hidden_states")
        return sample, (("args", 1) if len(self.args) > 1 else ("kwargs", "timestep"))

    def at(self, place: tuple[str, Any]) -> Any:
        """The argument there."""
        return (self.args if place[0] == "args" else self.kwargs)[place[1]]

    @property
    def sample(self) -> Tensor:
        """What the network saw."""
        return self.at(self.places[0])


@dataclass(frozen=True)
class Heard:
    """The first step of a pipeline.

    Attributes:
        calls: of the network.
        sample: what the scheduler's step was given, as are
        timestep: and
        output: the network's, once guidance has made one of it.
    """

    calls: list[NetworkCall]
    sample: Tensor
    timestep: float
    output: Tensor

    @property
    def doubled(self) -> bool:
        """Whether the pipeline's samples stand twice in its step, as in DiT's."""
        half = len(self.sample) // 2
        alike = half > 0 and torch.equal(self.sample[:half], self.sample[half : 2 * half])
        return alike and len(self.calls[0].sample) == len(self.sample) == 2 * half

    @property
    def pairs(self) -> int:
        """Samples of the batch."""
        return len(self.sample) // (2 if self.doubled else 1)

    @property
    def copies(self) -> int:
        """Rows that each of them has in a network call."""
        return len(self.calls[0].sample) // self.pairs


def hear(
    pipe: Any, network: nn.Module, probe: SolverScheduler, pairs: Sequence[tuple[Any, int]], given: dict[str, Any]
) -> Heard:
    """Run the pipeline for two steps, with `probe` as its scheduler, and keep what the first was given.

    Two, since PixArt's pipeline takes one for a distilled network.
    """
    calls: list[NetworkCall] = []
    steps: list[tuple[Tensor, float, Tensor]] = []

    def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not steps:
            calls.append(NetworkCall(args, kwargs, first_tensor(output).detach()))

    plain = probe.step

    @functools.wraps(plain)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append((sample.detach().clone(), float(timestep), model_output.detach().clone()))
        return plain(model_output, timestep, sample, *args, **kwargs)

    what = [prompt for prompt, _ in pairs]
    named = {"class_labels": what} if isinstance(what[0], Integral) else {"prompt": what}
    with _borrowed(pipe, probe), torch.no_grad():
        probe.step = step  # pyright: ignore[reportAttributeAccessIssue]
        handle = network.register_forward_hook(listen, with_kwargs=True)
        try:
            pipe(
                **named,
                **given,
                num_inference_steps=2,
                generator=[pair_generator(str(prompt), seed) for prompt, seed in pairs],
                output_type="latent",
            )
        finally:
            handle.remove()
            del probe.step
    if len(steps) != 2 or not calls:
        raise ValueError(
            f"{type(pipe).__name__} made {len(steps)} scheduler steps when asked for two; searches need them"
        )
    return Heard(calls, *steps[0])


def first_tensor(output: Any) -> Tensor:
    """A network's output."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _borrowed(pipe: Any, scheduler: Any) -> Iterator[None]:
    """The pipeline with another scheduler and without its progress bar."""
    before, bar = pipe.scheduler, dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(**bar | {"disable": True})
    try:
        yield
    finally:
        pipe.scheduler = before
        pipe.set_progress_bar_config(**bar)
