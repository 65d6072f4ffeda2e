"""Pictures as latents, and what a network would have to say for a run to lead to a known picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def encode(pipe: Any, picture: Any, *, height: int | None = None, width: int | None = None) -> Tensor:
    """Latents of a picture as the network takes them, (B, C, h, w).

    Args:
        pipe: a pipeline with an `AutoencoderKL`.
        picture: what the pipeline's image processor takes.
        height: pixels to resize to; the picture's own by default.
        width: likewise.

    Raises:
        TypeError: if the pipeline has no VAE, or none of that kind.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None or not hasattr(vae, "encode") or not hasattr(vae.config, "scaling_factor"):
        raise TypeError(f"{type(pipe).__name__} has no VAE with a scaling factor, which pictures are encoded with")
    pixels = pipe.image_processor.preprocess(picture, height=height, width=width).to(pipe._execution_device, vae.dtype)
    raw = vae.encode(pixels).latent_dist.mode()
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:  # Playground
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(raw) for values in (mean, std))
        return (raw - mean) * vae.config.scaling_factor / std
    return (raw - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def noised(scheduler: Any, clean: Tensor, noise: Tensor, step: int) -> Tensor:
    """The state in which a run is at a step, on its way from `noise` to `clean`, in the scheduler's own space."""
    alpha, sigma = levels(scheduler, step)
    return alpha * clean + sigma * noise


def answer(scheduler: Any, clean: Tensor, noise: Tensor, step: int) -> Tensor:
    """What a network says that sees through `noised`: the noise, the clean latents, v or the flow.

    It is linear in both: with changes of `clean` and `noise` it is the change of the answer.

    Raises:
        ValueError: for another prediction type.
    """
    kind = getattr(scheduler.config, "prediction_type", None) or "epsilon"
    if is_flow(scheduler):
        return noise - clean
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        alpha, sigma = levels(scheduler, step)
        scale = (alpha**2 + sigma**2) ** 0.5
        return (alpha * noise - sigma * clean) / scale
    raise ValueError(f"prediction_type={kind!r} is unknown; known are epsilon, sample, v_prediction, and flow models")


def is_flow(scheduler: Any) -> bool:
    """Whether the model predicts the flow from data to noise."""
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or getattr(config, "prediction_type", None) == "flow_prediction"
        or bool(getattr(config, "use_flow_sigmas", False))
    )


def levels(scheduler: Any, step: int) -> tuple[float, float]:
    """Factors of signal and noise at a step, in the scheduler's own space (1 and sigma for Euler on SD)."""
    if is_flow(scheduler) and len(scheduler.timesteps) <= step:
        return 0.0, 1.0
    time = scheduler.timesteps[step : step + 1]
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    mixed = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else None
    if mixed is not None and not hasattr(scheduler, "add_noise"):
        begun = scheduler._begin_index
        try:
            return float(mixed(one, time, zero)), float(mixed(zero, time, one))
        finally:
            scheduler._begin_index = begun
    return float(scheduler.add_noise(one, zero, time)), float(scheduler.add_noise(zero, one, time))


@contextmanager
def prepared(pipe: Any, change: Any) -> Iterator[None]:
    """While the block runs, the latents that the pipeline prepares pass through `change(latents) -> latents`."""
    method = getattr(pipe, "prepare_latents", None)
    if method is None:
        yield
        return

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if isinstance(result, Tensor):
            return change(result)
        return (change(result[0]), *result[1:])

    pipe.prepare_latents = changed
    try:
        yield
    finally:
        del pipe.prepare_latents
