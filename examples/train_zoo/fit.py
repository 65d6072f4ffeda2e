"""The training loop of every stage: EMA, a cosine learning rate over a budget, checkpoints that a run resumes from."""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Generic, TypeVar, cast

import torch
from checkpoint import Checkpoint, random_state, restore_random_state
from torch import nn

Batch = tuple[torch.Tensor, ...]
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class FitConfig:
    """How one stage is trained.

    Attributes:
        name: Name in the progress lines, and of the checkpoint folder.
        learning_rate: Peak of the cosine schedule.
        seconds: Wall-clock budget, summed over resumed runs.
        steps: Optional step budget; whichever budget ends first ends the stage.
        warmup_steps: Steps of linear warm-up.
        ema_decay: Decay a step of the averaged weights (shorter averages while the run is young).
        weight_decay: AdamW weight decay.
        mixed_precision: Run the loss under bfloat16 autocast; the weights stay in float32.
        compile: Run the model through `torch.compile`.
        save_every: Seconds between checkpoints.
        log_every: Seconds between progress lines.
    """

    name: str
    learning_rate: float
    seconds: float
    steps: int | None = None
    warmup_steps: int = 100
    ema_decay: float = 0.999
    weight_decay: float = 0.0
    mixed_precision: bool = False
    compile: bool = False
    save_every: float = 180.0
    log_every: float = 20.0

    def spent(self, elapsed: float, step: int) -> float:
        """Share of the budget that `elapsed` seconds and `step` steps have used; 1 or more when it is used up."""
        return max(elapsed / self.seconds, step / self.steps if self.steps else 0.0)

    def rate(self, step: int, spent: float) -> float:
        """Learning rate: linear warm-up over steps, then a cosine over the spent share of the budget."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * max(1e-3, warm * 0.5 * (1 + math.cos(math.pi * min(1.0, spent))))


class Average(Generic[Model]):
    """Exponential moving average of a model's parameters; `model` is the averaged copy."""

    def __init__(self, source: Model, decay: float) -> None:
        """Start the average at the present weights of `source`."""
        self.model: Model = copy.deepcopy(source).eval().requires_grad_(False)
        self.decay = decay
        self._averaged: list[torch.Tensor] = list(self.model.parameters())
        self._source: list[torch.Tensor] = list(source.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the source; `step` counts from 1 and shortens early averages."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._source, weight)


class _Progress:
    """Prints loss (averaged since the last line), learning rate, steps a second and the time that is left."""

    def __init__(self, config: FitConfig, step: int) -> None:
        self.config, self.step, self.since = config, step, time.monotonic()
        self.losses: list[torch.Tensor] = []

    def note(self, step: int, loss: torch.Tensor, rate: float, elapsed: float) -> None:
        self.losses.append(loss.detach())
        now, spent = time.monotonic(), self.config.spent(elapsed, step)
        if now - self.since < self.config.log_every and spent < 1:
            return
        mean = torch.stack(self.losses).mean().item()
        speed = (step - self.step) / max(now - self.since, 1e-9)
        left = max(0.0, elapsed / spent - elapsed)
        print(
            f"[{self.config.name}] step {step} loss {mean:.4f} lr {rate:.2e} {speed:.2f} steps/s "
            f"spent {elapsed:.0f} s left {left:.0f} s",
            flush=True,
        )
        self.losses, self.step, self.since = [], step, now


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that the loop can end between two steps, never inside one."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Fit(Generic[Model]):
    """The state of one stage while it is trained."""

    def __init__(self, model: Model, loss_function: LossFunction, config: FitConfig, checkpoints: Path) -> None:
        self.model, self.config, self.checkpoint = model, config, Checkpoint(checkpoints / config.name)
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.0, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.average = Average(model, config.ema_decay)
        self.loss_function = loss_function
        self.network = cast(nn.Module, torch.compile(model)) if config.compile else model
        self.step, self.elapsed = 0, 0.0

    def resume(self) -> None:
        state = self.checkpoint.load(self.model, self.average.model)
        if state is None:
            return
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"], self.device)
        self.step, self.elapsed = state["step"], state["elapsed"]
        print(f"[{self.config.name}] resumed at step {self.step}, {self.elapsed:.0f} s spent", flush=True)

    def save(self) -> None:
        state = {
            "elapsed": self.elapsed,
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(self.device),
        }
        self.checkpoint.save(self.step, self.model, self.average.model, state)

    def spent(self) -> float:
        return self.config.spent(self.elapsed, self.step)

    def advance(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """One step of the optimizer and of the average; the loss and the learning rate."""
        rate = self.config.rate(self.step, self.spent())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision):
            loss = self.loss_function(self.network, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.average.update(self.step)
        return loss, rate


def fit(
    model: Model,
    loss_function: LossFunction,
    next_batch: Callable[[], Batch],
    config: FitConfig,
    checkpoints: Path,
    resume: bool,
    export: Callable[[Model], None],
) -> Model:
    """Train `model` in place until the budget is spent and return its averaged copy.

    Args:
        model: The model, on its device, in float32.
        loss_function: Scalar loss of (model, batch).
        next_batch: Draws a batch with torch's global random numbers (whose state a checkpoint holds).
        config: Budget and optimizer settings.
        checkpoints: Where checkpoints go, in a folder of the stage's name.
        resume: Go on from the newest checkpoint there; a finished stage returns at once.
        export: Called with the averaged model at every checkpoint, to keep a usable model on disk.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM; the checkpoint was written first.
    """
    state = _Fit(model, loss_function, config, checkpoints)
    if resume:
        state.resume()
    report = _Progress(config, state.step)
    saved = last = time.monotonic()
    with _stop_requests() as stop:
        while state.spent() < 1 and not stop:
            loss, rate = state.advance(next_batch())
            now = time.monotonic()
            state.elapsed, last = state.elapsed + now - last, now
            report.note(state.step, loss, rate, state.elapsed)
            if now - saved > config.save_every:
                state.save()
                export(state.average.model)
                saved = now
        state.save()
        export(state.average.model)
    if stop:
        raise KeyboardInterrupt(f"{config.name} was stopped at step {state.step}; --resume goes on from there")
    return state.average.model
