"""Problem: what a search knows of a model. Noise levels, starts, and x0 predictions at any of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffaccel.samplers.schedule import NoiseSchedule

Denoise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Problem:
    """A denoiser with its conditions, and one noise for each of them: the pairs that a search fits or judges on.

    Attributes:
        schedule: noise schedule of the network.
        noise: (B, ...) float32 samples x at the schedule's last timestep, where runs begin.
        function: (x (n, ...), half log-SNR (n,), times (n,), conditions (n,)) -> x0 predictions, guidance included.
        spent: samples the network has seen. With guidance each is two rows of its batch, and counts once.
        key: of everything that decides the predictions, for caches; "" where there is none.
        batch: samples a call.
        network: behind `function`, where there is one.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        function: Denoise,
        noise: Tensor,
        *,
        key: str = "",
        batch: int = 32,
        network: torch.nn.Module | None = None,
        conditions: Tensor | None = None,
    ) -> None:
        self.schedule, self.function, self.noise, self.key, self.batch = schedule, function, noise, key, batch
        self.network = network
        self.spent = 0
        self._conditions = torch.arange(len(noise)) if conditions is None else conditions

    def __len__(self) -> int:
        return len(self.noise)

    def denoise(
        self,
        x: Tensor,
        lam: float | Tensor,
        time: float | Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x0 predictions (n, ...) for samples `x`; differentiable in all that `function` is.

        Args:
            x: samples.
            lam: half log-SNR of all, or of each (n,).
            time: what the network is told, likewise; default: the time of that noise.
            rows: (n,) pairs whose conditions the samples have; default: all of them in order.
        """
        n = len(x)
        levels = torch.as_tensor(lam, dtype=torch.float64).expand(n)
        if time is None:
            time = torch.from_numpy(self.schedule.time_at(levels.detach().numpy()))
        times = torch.as_tensor(time, dtype=torch.float64).expand(n)
        conditions = self._conditions if rows is None else self._conditions[rows]
        if len(conditions) != n:
            raise ValueError(
                f"{n} samples were given for {len(conditions)} pairs; say with `rows` which they belong to"
            )
        self.spent += n
        parts = [
            self.function(x[part], levels[part], times[part], conditions[part])
            for part in (slice(i, i + self.batch) for i in range(0, n, self.batch))
        ]
        return torch.cat(parts)

    def part(self, rows: Tensor | slice) -> Problem:
        """The same network on some of the pairs; it counts its own calls."""
        return Problem(
            self.schedule,
            self.function,
            self.noise[rows],
            key=self.key,
            batch=self.batch,
            network=self.network,
            conditions=self._conditions[rows],
        )
