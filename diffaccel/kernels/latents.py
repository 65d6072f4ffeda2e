"""Pictures as latents, and what a network would have to say for a run to lead to a known picture."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def encode(pipe: Any, picture: Any, *, height: int | None = None, width: int | None = None) -> Tensor:
    """Latents of a picture as the network takes them, (B, C, h, w).

    Args:
        pipe: a pipeline with an `AutoencoderKL` or `AutoencoderTiny`.
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
    told = vae.encode(pixels)
    raw = told.latents if hasattr(told, "latents") else told.latent_dist.mode()  # `AutoencoderTiny`
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:  # Playground
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(raw) for values in (mean, std))
        return (raw - mean) * vae.config.scaling_factor / std
    return (raw - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """Latents of `encode` as the pipeline's loop has them: Flux packs them to tokens, (B, tokens, 4 C)."""
    return pipe._pack_latents(latents, *latents.shape) if hasattr(pipe, "_pack_latents") else latents


def noised(scheduler: Any, clean: Tensor, noise: Tensor, step: int | None) -> Tensor:
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
    if (data := getattr(scheduler.config, "sigma_data", None)) is not None:  # EDM's preconditioning, table 1
        sigma = levels(scheduler, step)[1]
        sign = -1 if kind == "v_prediction" else 1
        return sign * (sigma / data * clean - data * noise) / (sigma**2 + data**2) ** 0.5
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


def levels(scheduler: Any, step: int | None) -> tuple[float, float]:
    """Factors of signal and noise at a step, in the scheduler's own space (1 and sigma for Euler on SD).

    None is for pure noise, with which pipelines begin that ask the scheduler for steps only afterwards (Flux, SD3).
    """
    if step is None:
        return 0.0, float(getattr(scheduler, "init_noise_sigma", 1.0))
    between = getattr(scheduler, "sigmas_interpol", None)
    if between is not None and not scheduler.state_in_first_order:  # DPM2's second call has a sigma of its own
        return 1.0, float(between[step - ("Ancestral" in type(scheduler).__name__)])
    time = scheduler.timesteps[step : step + 1]
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if hasattr(scheduler, "add_noise"):
        return float(scheduler.add_noise(one, zero, time)), float(scheduler.add_noise(zero, one, time))
    return float(scheduler.scale_noise(one, time, zero)), float(scheduler.scale_noise(zero, time, one))


def unscaled(scheduler: Any, seen: Tensor, timestep: Any) -> Tensor:
    """The state that a network sees: schedulers with sigmas, such as Euler, scale it before a call."""
    scale = getattr(scheduler, "scale_model_input", None)
    return seen if scale is None else seen / float(scale(torch.ones(1, 1, 1, 1, dtype=torch.float64), timestep))


@contextmanager
def prepared(pipe: Any, change: Any) -> Iterator[None]:
    """While the block runs, the latents that the pipeline prepares pass through `change(latents, step) -> latents`.

    The step is that at which the run begins, or None if the scheduler was not yet asked for steps.
    """
    method, before = getattr(pipe, "prepare_latents", None), pipe.scheduler.timesteps
    if method is None:
        yield
        return

    def changed(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        step = None if pipe.scheduler.timesteps is before else _first(pipe.scheduler, given.get("timestep"))
        if isinstance(result, Tensor):
            return change(result, step)
        return (change(result[0], step), *result[1:])

    pipe.prepare_latents = changed
    try:
        yield
    finally:
        del pipe.prepare_latents


def _first(scheduler: Any, timestep: Tensor | None) -> int:
    """Step at which a run begins: image-to-image leaves some out."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None or timestep is None:
        return begin or 0
    return int((scheduler.timesteps.double().cpu() - float(timestep.flatten()[0])).abs().argmin())
