"""At which step of its run a scheduler is, when the network is called."""

from __future__ import annotations

from typing import Any

import torch

_SCALES = (1.0, 1e-3)  # Flux tells the network timestep / 1000
_CLOSE = 0.01  # of the largest timestep: what rounding to bfloat16 may change
_FOREIGN = "a policy works on the pipeline it was attached to: attach it to the pipeline that you call"


class Clock:
    """Reads the step off the scheduler.

    Schedulers with a `step_index` say it themselves: a timestep that occurs twice (Heun, DPM2) would not. PNDM has a
    counter. DDIM and DDPM have no state; their timesteps are all different, so that the timestep tells the step.

    A network may be called by a pipeline with another scheduler. Then this one does not move, or the timesteps are not
    its own, or not in its order: all methods that read the step raise `ValueError`.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self._known: Any = None
        self._start = 0  # PNDM's first step
        self._last: int | None = None  # that a timestep has told

    def new_run(self, scheduler: Any) -> bool:
        """Whether `set_timesteps` was called since this clock was read; then it starts anew."""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is self._known and timesteps is not None:
            return False
        self._known = timesteps
        self.times = [float(time) for time in timesteps] if timesteps is not None and _is_set(scheduler) else []
        self._start, self._last = 0, None
        return True

    def step(self, scheduler: Any, timestep: Any) -> int:
        """Index in `scheduler.timesteps` of the step that this network call belongs to.

        Args:
            scheduler: of the pipeline.
            timestep: what the network is told, a number or a tensor, (1,) or one for each row, all alike.
        """
        index = self._index(scheduler, timestep)
        if index >= len(self.times):
            raise ValueError(f"the scheduler has made all its steps, and the network is called again; {_FOREIGN}")
        return index

    def _index(self, scheduler: Any, timestep: Any) -> int:
        if hasattr(scheduler, "step_index"):
            if (index := scheduler.step_index) is not None:
                return int(index)
            begin = getattr(scheduler, "begin_index", None)  # nothing was done yet in this run
            return int(begin) if begin is not None and self.times else self.lookup(timestep)
        if hasattr(scheduler, "counter"):  # PNDM
            if scheduler.counter <= 1:  # its second timestep occurs twice: the call after tells which one was first
                self._start = max(self._start, self.lookup(timestep) - scheduler.counter)
            return self._start + scheduler.counter
        index = self.lookup(timestep)
        if self._last is not None and index > self._last + 1:
            raise ValueError(f"the network was called at step {self._last} and then at {index}; {_FOREIGN}")
        self._last = index
        return index

    def lookup(self, timestep: Any) -> int:
        """Index of the first entry that is `timestep`.

        Raises:
            ValueError: if there is none.
        """
        if not self.times:
            raise ValueError("the scheduler has no timesteps yet; call scheduler.set_timesteps(n) before the network")
        told = first(timestep)
        distance, index = min((abs(told - s * time), i) for s in _SCALES for i, time in enumerate(self.times))
        if distance > _CLOSE * max(1e-3, abs(told)):
            raise ValueError(
                f"the network was called at timestep {told:g}, which is none of the scheduler's; {_FOREIGN}"
            )
        return index

    def check(self, step: int, timestep: Any, scale: float = 1.0) -> None:
        """Raise unless a network call at `timestep` can be one of this step; `scale` as in Sana's `timestep_scale`."""
        told, limit = first(timestep), _CLOSE * max(map(abs, self.times))
        if not any(abs(told - s * self.times[step]) <= limit * s for s in (*_SCALES, scale)):
            raise ValueError(
                f"the network was called at timestep {told:g}, and its scheduler is at {self.times[step]:g}; {_FOREIGN}"
            )


def first(timestep: Any) -> float:
    """The timestep of the first row."""
    return float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)


def _is_set(scheduler: Any) -> bool:
    """Whether `set_timesteps` was ever called: new schedulers list the training's timesteps."""
    if getattr(scheduler, "num_inference_steps", None) is not None:
        return True
    return len(scheduler.timesteps) != scheduler.config.get("num_train_timesteps")  # given `timesteps`
