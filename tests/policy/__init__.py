"""Toy pipelines with a smaller network beside their own, and another way to stitch them: by counting calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.samplers.policy import Grid, Handle, Plan
from tests import tiny
from tests.tiny import Toy, draw

KINDS = ("sd", "sdxl", "sd3", "flux", "dit", "pixart")
# What makes the toy networks smaller.
_SMALLER: dict[str, dict[str, Any]] = {
    "UNet2DConditionModel": {"block_out_channels": (4, 8)},
    "SD3Transformer2DModel": {"num_layers": 1},
    "FluxTransformer2DModel": {"num_single_layers": 0},
    "DiTTransformer2DModel": {"num_attention_heads": 1},
    "PixArtTransformer2DModel": {"num_attention_heads": 1, "cross_attention_dim": 4},
    "WanTransformer3DModel": {"ffn_dim": 8},
    "SanaTransformer2DModel": {"num_attention_heads": 1, "num_cross_attention_heads": 1, "cross_attention_dim": 4},
}


@dataclass(frozen=True)
class Fixed:
    """A policy whose plan is written down."""

    table: tuple[tuple[str, ...], ...]

    def plan(self, grid: Grid, conditioning: Mapping[str, Any]) -> Plan:
        return Plan(self.table)


def toy(name: str) -> Toy:
    """A pipeline with a network and a scheduler of its own, to be changed as one likes."""
    pipe, call = getattr(tiny, name)()
    pipe = copy.copy(pipe)
    part = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    pipe.register_modules(**{part: copy.deepcopy(getattr(pipe, part)), "scheduler": copy.deepcopy(pipe.scheduler)})
    return pipe, call


def denoiser(pipe: Any) -> Any:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def like(network: Any, seed: int = 1, **config: Any) -> Any:
    """Another network of this class, with other random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        known = {key: value for key, value in network.config.items() if not key.startswith("_")}
        return type(network)(**{**known, **config}).eval()


def smaller(pipe: Any, seed: int = 1) -> Any:
    network = denoiser(pipe)
    return like(network, seed, **_SMALLER[type(network).__name__])


def calls(handle: Handle) -> dict[str, int]:
    """Calls of the last run by network, as its report has them, but without the cost that it counts."""
    return handle._hook.spent.report(lambda name, call: 0).calls


@contextmanager
def forward(network: Any, function: Callable[..., Any]) -> Any:
    """`function(original, *args, **kwargs)` in place of the forward of a network."""
    original = network.forward
    network.forward = lambda *args, **kwargs: function(original, *args, **kwargs)
    try:
        yield
    finally:
        network.__dict__.pop("forward")


def oracle(
    toy: Toy,
    networks: Sequence[Any],
    counts: Sequence[int],
    steps: int,
    scheduler: Any = None,
    per_step: int = 1,
    **call: Any,
) -> Tensor:
    """The picture if the first `counts[0]` steps are of `networks[0]`, and so on, the rest of the pipeline's own."""
    queue = [network for network, count in zip(networks, counts, strict=True) for _ in range(count * per_step)]

    def chosen(original: Any, *args: Any, **kwargs: Any) -> Any:
        return (queue.pop(0) if queue else original)(*args, **kwargs)

    with forward(denoiser(toy[0]), chosen):
        return draw(toy, scheduler or toy[0].scheduler, steps, **call)
