"""With what a run begins, and how an edit changes that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.latents import answer, levels, noised


@dataclass(frozen=True)
class Shift:
    """Change of the clean latents and of the noise, which a run is a mixture of: both shaped as the latents.

    As all is linear, the states of the run change by `noised` of it, and what the network says by `answer`.
    """

    clean: Tensor
    noise: Tensor

    def state(self, scheduler: Any, step: int | None) -> Tensor:
        """Change of the state at a step."""
        return noised(scheduler, self.clean, self.noise, step)

    def output(self, scheduler: Any, step: int, output: Tensor, moved: Tensor) -> Tensor:
        """The network's output, changed; variances that it may hold besides are left.

        Args:
            scheduler: of the run.
            step: of the call.
            output: of the network, for the state of the reference.
            moved: what the network's input has more than that of the reference, unscaled. The noise in it is not
                `noise` any more where the scheduler adds noise of its own (DDPM, ancestral, SDE).
        """
        clean = self.clean.repeat(len(output) // len(self.clean), *[1] * (output.ndim - 1)).to(moved)
        alpha, sigma = levels(scheduler, step)
        told = answer(scheduler, clean, (moved[:, : clean.shape[1]] - alpha * clean) / sigma, step).to(output)
        return torch.cat([output[:, : told.shape[1]] + told, output[:, told.shape[1] :]], 1)


@dataclass(frozen=True)
class Start:
    """Of a reference.

    Attributes:
        latents: as the pipeline prepared them.
        noise: in them; None if there is a picture in them too.
    """

    latents: Tensor
    noise: Tensor | None

    def shifted(self, scheduler: Any, step: int | None, inside: Tensor, shift: Shift | None) -> Start:
        """Changed in the mask, `inside` (bool, as the latents)."""
        if shift is None:
            return self
        latents = torch.where(inside, self.latents + shift.state(scheduler, step).to(self.latents), self.latents)
        noise = None if self.noise is None else torch.where(inside, self.noise + shift.noise, self.noise)
        return Start(latents, noise)


def draw(like: Tensor, generator: Any) -> Tensor:
    """Normal noise in the shape of `like`, from a generator or one for each row."""
    if isinstance(generator, list):
        rows = [torch.randn(like.shape[1:], generator=one, device=one.device) for one in generator]
        return torch.stack(rows).to(like)
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def copied(generator: Any) -> Any:
    """Generators that will draw what these would."""
    if isinstance(generator, list):
        return [copied(one) for one in generator]
    return torch.Generator(generator.device).set_state(generator.get_state())


def random_state() -> list[Tensor]:
    """Of PyTorch's own generators, from which pipelines draw that hand theirs not on to the scheduler (DiT, Flux)."""
    return [source.get_rng_state() for source in _sources()]


@contextmanager
def random_from(state: list[Tensor]) -> Iterator[None]:
    """Draw in the block as from `random_state`, and go on afterwards as if it had not been."""
    before = random_state()
    _restore(state)
    try:
        yield
    finally:
        _restore(before)


def _restore(state: list[Tensor]) -> None:
    for source, one in zip(_sources(), state, strict=True):
        source.set_rng_state(one)


def _sources() -> list[Any]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [torch] if accelerator is None else [torch, torch.get_device_module(accelerator)]
