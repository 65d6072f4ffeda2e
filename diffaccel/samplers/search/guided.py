"""A network with its conditions and its guidance, called alone as its pipeline calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.samplers.row import edm_coefficients, x0_coefficients
from diffaccel.samplers.scheduler import SolverScheduler
from diffaccel.samplers.search.heard import Heard, first_tensor

TOLERANCE = 1e-3  # relative, of the pipeline's own step
TOLERANCE_16_BIT = 2e-2
SHARED = ("img_ids", "txt_ids")  # Flux: where the tokens are, of all samples; there may be as many as samples
REFUSAL = (
    "this pipeline does more with the network's output than classifier-free guidance (guidance_rescale, PAG, "
    "ControlNet, ...), or its guidance is off at the first step; searches cannot follow it"
)


class Guided:
    """x0 predictions of a network for any sample, time and condition of the steps that were heard.

    The guidance is put together as those steps show, and checked on the first of them.
    """

    def __init__(self, network: nn.Module, probe: SolverScheduler, heard: Sequence[Heard], scale: float) -> None:
        first = heard[0]
        call = first.calls[0]
        self.network, self.probe, self.scale = network, probe, scale
        self.copies, self.channels = first.copies, first.sample.shape[1]
        self.places = [one.places for one in first.calls]
        self.conditions = [
            _joined([_split((one.calls[k].args, one.calls[k].kwargs), one.pairs, one.copies) for one in heard])
            for k in range(len(first.calls))
        ]
        told = call.at(call.places[1])
        self.time_dtype = told.dtype if isinstance(told, Tensor) and told.is_floating_point() else torch.float32
        self.time_scale = float(torch.as_tensor(told).flatten()[0]) / first.timestep
        self.device, self.dtype = call.sample.device, call.sample.dtype
        wanted = first.output[: first.pairs, : self.channels].float()
        self.conditional_first = self._conditional_first([one.output for one in first.calls], wanted)
        self._check(first, wanted)

    def __call__(self, x: Tensor, lam: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        """x0 predictions in the type and on the device of `x`; arguments as of `Problem.function`."""
        output = self.guided(x, lam, time, rows)
        p, q = (_per_sample(v, x) for v in self._x0(lam))
        return p * x + q * output.to(x)

    def guided(self, x: Tensor, lam: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        """What the pipeline's scheduler would be given, float32."""
        if self.probe.schedule.path == "ve":
            x = x * _per_sample(((-2 * lam).exp() + self.probe.config["sigma_data"] ** 2) ** -0.5, x)
        seen = torch.cat([x.to(self.device, self.dtype)] * self.copies)
        told = (time * self.time_scale).to(self.device, self.time_dtype).repeat(self.copies)
        outputs = []
        for conditions, places in zip(self.conditions, self.places, strict=True):
            args, kwargs = _taken(conditions, rows)
            given = {"args": list(args), "kwargs": dict(kwargs)}
            for (kind, key), value in zip(places, (seen, told), strict=True):
                given[kind][key] = value
            outputs.append(first_tensor(self.network(*given["args"], **given["kwargs"])))
        a, b = self._halves(outputs)
        if b is None:
            return a
        return b + self.scale * (a - b) if self.conditional_first else a + self.scale * (b - a)

    def _halves(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The one output of each pair, or the two; variances that they may hold besides are left out."""
        copies = self.copies if len(outputs) == 1 else 1
        halves = [half.float() for output in outputs for half in output.chunk(copies)]
        halves = [half[:, : self.channels] if half.ndim == 4 else half for half in halves]
        if len(halves) > 2:
            raise ValueError(REFUSAL)
        return halves[0], halves[1] if len(halves) == 2 else None

    def _conditional_first(self, outputs: Sequence[Tensor], wanted: Tensor) -> bool:
        """Which half of a guided call has the prompt, by what the pipeline made of the two."""
        a, b = self._halves(outputs)
        if b is None or self._close(a + self.scale * (b - a), wanted):
            return False
        if self._close(b + self.scale * (a - b), wanted):
            return True
        raise ValueError(REFUSAL)

    @torch.no_grad()
    def _check(self, one: Heard, wanted: Tensor) -> None:
        """Call the network alone at the step that was heard."""
        n = one.pairs
        times = torch.full((n,), one.timestep, dtype=torch.float64)
        lam = torch.from_numpy(self.probe.schedule.lambda_at(times.numpy()))
        if not self._close(self.guided(one.sample[:n].float(), lam, times, torch.arange(n)), wanted):
            raise ValueError(REFUSAL)

    def _close(self, a: Tensor, b: Tensor) -> bool:
        limit = TOLERANCE if self.dtype == torch.float32 else TOLERANCE_16_BIT
        return a.shape == b.shape and bool((a - b).norm() <= limit * b.norm())

    def _x0(self, lam: Tensor) -> tuple[Any, Any]:
        """`SolverScheduler._x0_of` for a tensor, differentiable."""
        path, predicts = self.probe.schedule.path, self.probe.prediction_type
        if path == "ve":
            return edm_coefficients(predicts, (-lam).exp(), self.probe.config["sigma_data"])  # pyright: ignore
        k = 2 if path == "vp" else 1  # alpha^k + sigma^k = 1
        alpha, sigma = torch.sigmoid(k * lam) ** (1 / k), torch.sigmoid(-k * lam) ** (1 / k)
        return x0_coefficients(predicts, alpha, sigma)  # pyright: ignore[reportArgumentType]


def _per_sample(values: Any, like: Tensor) -> Tensor:
    values = torch.as_tensor(values).to(like.device, like.dtype)
    return values.view(-1, *[1] * (like.ndim - 1)) if values.ndim else values


def _split(value: Any, pairs: int, copies: int) -> Any:
    """Tensors with a row for each pair and copy become (copies, pairs, ...); all else stays."""
    if isinstance(value, Tensor):
        rows = pairs * copies
        return Rows(value.detach().unflatten(0, (copies, pairs))) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: one if key in SHARED else _split(one, pairs, copies) for key, one in value.items()}
    return type(value)(_split(one, pairs, copies) for one in value) if isinstance(value, tuple | list) else value


@dataclass(frozen=True, eq=False)
class Rows:
    """A condition with a row for each pair: (copies, pairs, ...)."""

    values: Tensor


def _joined(parts: Sequence[Any]) -> Any:
    """The same nests of several steps, with the pairs of all of them."""
    first = parts[0]
    if isinstance(first, Rows):
        return Rows(torch.cat([part.values for part in parts], 1))
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_joined(list(group)) for group in zip(*parts, strict=True))
    return first


def _taken(value: Any, rows: Tensor) -> Any:
    """The conditions of some pairs, as the network takes them."""
    if isinstance(value, Rows):
        return value.values[:, rows.to(value.values.device)].flatten(0, 1)
    if isinstance(value, dict):
        return {key: _taken(one, rows) for key, one in value.items()}
    return type(value)(_taken(one, rows) for one in value) if isinstance(value, tuple | list) else value
