"""With what a run begins, and how an edit changes that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.latents import answer, noised


@dataclass(frozen=True)
class Shift:
    """Change of the clean latents and of the noise, which a run is a mixture of: both shaped as the latents.

    As all is linear, the states of the run change by `noised` of it, and what the network says by `answer`.
    """

    clean: Tensor
    noise: Tensor

    def state(self, scheduler: Any, step: int) -> Tensor:
        """Change of the state at a step."""
        return noised(scheduler, self.clean, self.noise, step)

    def output(self, scheduler: Any, step: int, output: Tensor) -> Tensor:
        """The network's output, changed; variances that it may hold besides are left."""
        told = answer(scheduler, self.clean, self.noise, step).to(output)
        told = told.repeat(len(output) // len(told), *[1] * (told.ndim - 1))
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

    def shifted(self, scheduler: Any, step: int, inside: Tensor, shift: Shift | None) -> Start:
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
