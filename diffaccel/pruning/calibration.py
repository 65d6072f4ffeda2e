"""Calibration: calls of the denoiser to look at, recorded from real trajectories, or random where there are none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging
from torch import Tensor, nn

from diffaccel.cost import denoisers
from diffaccel.pruning.influence import influence
from diffaccel.pruning.inputs import example_inputs

Prompt = str | int | Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of the denoiser, tensors on the CPU, in the dtype of the call.

    Attributes:
        args: positional ones.
        kwargs: the others.
        weight: how much an error here counts, see `influence`; 1 on average over a trajectory.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weight: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """Calls of the denoiser.

    Attributes:
        calls: at least one, spread over prompts and over the steps of the trajectories.
        source: "trajectories" or "random".
    """

    calls: tuple[Call, ...]
    source: str = "trajectories"


def record(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    calls: int = 32,
    steps: int = 20,
    guidance_scale: float | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Calibration:
    """Run the pipeline and keep some of the calls of its denoiser, with all that the network was given.

    Every prompt costs a picture: ten of them, unlike each other, are plenty. Every prompt gives its share of the calls,
    evenly spread over its trajectory, and prompts differ in the steps that they give. A call counts by how much an
    error in it moves the end of the trajectory (`influence`). With guidance a call holds both rows, as the pipeline
    makes it. Prompt i starts from noise of seed `seed + i`; the scheduler is the pipeline's. At most `calls` calls and
    those of one trajectory are in memory.

    Args:
        pipe: a pipeline with one denoiser (SD, SDXL, DiT, PixArt, SD3, Flux, unconditional ones).
        prompts: texts; class numbers (DiT); or mappings of arguments for the pipeline, `{}` where it takes none.
        calls: calls to keep; with more prompts than that, `calls` of them are run, evenly spread over the list.
        steps: steps of each trajectory; with fewer than its share of calls, a trajectory gives all it has.
        guidance_scale: guidance of the pipeline; None: its default.
        seed: seed of the first prompt's noise.
        arguments: further ones for every run of the pipeline, such as `height`.

    Raises:
        ValueError: without prompts, for a single text instead of a list, for numbers below 1, or two denoisers.
        TypeError: for a pipeline without a denoiser, or a prompt of another kind.
    """
    prompts = _checked(prompts)
    if calls < 1 or steps < 1:
        raise ValueError(f"calibration needs calls >= 1 and steps >= 1, not {calls} and {steps}")
    network = _network(pipe)
    if guidance_scale is not None:
        arguments["guidance_scale"] = guidance_scale
    arguments = {"output_type": "latent", "num_inference_steps": steps} | arguments
    kept: list[Call] = []
    quotas = {i: calls * (i + 1) // len(prompts) - calls * i // len(prompts) for i in range(len(prompts))}
    runs = [(i, quota) for i, quota in quotas.items() if quota]
    with _quiet(pipe):
        for j, (i, quota) in enumerate(logging.tqdm(runs, desc="calibration")):
            with _listening(network) as heard:
                generator = torch.Generator("cpu").manual_seed(seed + i)
                pipe(**{"generator": generator} | arguments | named(prompts[i]))
            kept += _spread(_weighted(heard, pipe), quota, (j + 0.5) / len(runs))
    if not kept:
        raise ValueError(f"{type(pipe).__name__} made no call of its denoiser; is `steps` large enough?")
    return Calibration(tuple(kept))


def random_calls(model: nn.Module, n: int = 8, *, seed: int = 0, **inputs: Any) -> Calibration:
    """Calls with random inputs, for a network without a pipeline; timesteps are spread over the whole range.

    A trained network has never seen such inputs: noise without a picture, and texts that mean nothing. Criteria that
    look at activations or gradients are less to be trusted than with `record`.

    Args:
        model: a network that `example_inputs` knows.
        n: number of calls.
        seed: seed of the first call.
        inputs: further arguments of `example_inputs`, such as `size`.

    Raises:
        ValueError: if `n` is below 1.
        TypeError: for a class that `example_inputs` does not know.
    """
    if n < 1:
        raise ValueError(f"calibration needs at least one call, not {n}")
    # Flux is told sigma itself; only U-Nets with a table of learned times have their number in the config.
    flux = isinstance(model, FluxTransformer2DModel)
    end = 1.0 if flux else getattr(cast(Any, model).config, "num_train_timesteps", None) or 1000.0
    calls = []
    for i in range(n):
        kwargs = example_inputs(model, seed=seed + i, **inputs)
        kwargs["timestep"] = torch.full_like(kwargs["timestep"], end * (i + 0.5) / n)
        calls.append(Call((), _copy(kwargs, None)))
    return Calibration(tuple(calls), "random")


def run(model: nn.Module, call: Call) -> Tensor:
    """Prediction of the network for a recorded call, on the network's device; autograd is the caller's business.

    Of a network with a learned variance (DiT, PixArt-alpha) the first half of the channels: what pipelines keep. A call
    in half precision may be made of a network in float32: float16 is good enough to draw, not for gradients.
    """
    weight = next(model.parameters())
    output = model(*_to(call.args, weight), **_to(call.kwargs, weight))[0]  # of a tuple, or Diffusers' output class
    channels = cast(Any, model).config.in_channels
    return output[:, :channels] if output.ndim == 4 and output.shape[1] == 2 * channels else output


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Without dropout (DiT drops labels in training mode) and without gradients of weights while the block runs."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, needed in asked:
            weight.requires_grad_(needed)


def _checked(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        raise ValueError("calibration prompts must be a list; write [prompt] for a single one")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("calibration needs at least one prompt; give texts, class numbers (DiT) or pipeline arguments")
    return prompts


def named(prompt: Prompt) -> dict[str, Any]:
    """Arguments of the pipeline for one prompt."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, int):
        return {"class_labels": [prompt]}
    if isinstance(prompt, Mapping):
        return dict(prompt)
    raise TypeError(f"a calibration prompt is a text, a class number or a mapping, not {type(prompt).__name__}")


def _network(pipe: Any) -> nn.Module:
    found = denoisers(pipe)
    if len(found) > 1:
        raise ValueError(f"{type(pipe).__name__} has several denoisers ({', '.join(found)}); one can be calibrated")
    return next(iter(found.values()))


def _weighted(calls: list[Call], pipe: Any) -> list[Call]:
    """The calls of a whole trajectory with their influence, if there is one call a timestep."""
    scheduler = getattr(pipe, "scheduler", None)
    times = getattr(scheduler, "timesteps", ())
    if scheduler is None or len(times) != len(calls):
        return calls
    weights = influence(scheduler, [float(time) for time in times])
    return [replace(call, weight=float(weight)) for call, weight in zip(calls, weights, strict=True)]


def _spread(calls: list[Call], quota: int, offset: float) -> list[Call]:
    """`quota` calls in even distances, the first one at a share `offset` of the distance; all if there are fewer."""
    quota = min(quota, len(calls))
    return [calls[int((k + offset) * len(calls) / quota)] for k in range(quota)]


@contextlib.contextmanager
def _listening(network: nn.Module) -> Iterator[list[Call]]:
    """Copies of the arguments of every call of `network` in the block."""
    heard: list[Call] = []

    def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last = heard[-1] if heard else Call((), {})
        with torch.inference_mode(False):  # else the copies could never take part in a gradient
            heard.append(Call(_copy(args, last.args), _copy(kwargs, last.kwargs)))

    handle = network.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()


def _copy(value: Any, last: Any) -> Any:
    """Copy on the CPU, through tuples, lists and dicts; what equals its counterpart in `last` is that one.

    A prompt's embeddings are the same in every step, and larger than the latents: they are kept once.
    """
    if isinstance(value, Tensor):
        new = value.detach().to("cpu", copy=True)
        same = isinstance(last, Tensor) and last.dtype == new.dtype and torch.equal(last, new)
        return last if same else new
    if isinstance(value, dict):
        before = last if isinstance(last, dict) else {}
        return {key: _copy(item, before.get(key)) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        before = last if isinstance(last, (tuple, list)) and len(last) == len(value) else [None] * len(value)
        return type(value)(_copy(item, old) for item, old in zip(value, before, strict=True))
    return value


def _to(value: Any, weight: Tensor) -> Any:
    """On the device of `weight`; half precision in its type, if that is wider."""
    if isinstance(value, Tensor):
        half = value.dtype in (torch.float16, torch.bfloat16)
        wider = half and torch.promote_types(value.dtype, weight.dtype) == weight.dtype
        return value.to(weight.device, weight.dtype if wider else value.dtype)
    if isinstance(value, dict):
        return {key: _to(item, weight) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, weight) for item in value)
    return value


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's progress bar, which would break ours."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
