"""Editors on the toy pipelines, with 16 x 16 pixels, and what is in the mask and outside of it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffaccel
from diffaccel import SparseEditConfig, SparseEditPipeline
from tests import tiny
from tests.tiny import SD_BETAS, noise

SIDE, STEPS = 16, 5
MASK = np.zeros((SIDE, SIDE), bool)
MASK[2:6, 4:8] = True
ELSEWHERE = np.roll(MASK, 8, (0, 1))
PLAIN: dict[str, Any] = {**SD_BETAS, "clip_sample": False, "steps_offset": 1}
SIGMAS: dict[str, Any] = {**SD_BETAS, "steps_offset": 1}

SCHEDULERS: dict[str, Any] = {
    "ddim": lambda **c: diffusers.DDIMScheduler(**PLAIN, **c),
    "pndm": lambda **c: diffusers.PNDMScheduler(**SIGMAS, **c, skip_prk_steps=True, set_alpha_to_one=True),
    "euler": lambda **c: diffusers.EulerDiscreteScheduler(**SIGMAS, **c),
    "dpmpp_2m": lambda **c: diffusers.DPMSolverMultistepScheduler(**SIGMAS, **c),
    "dpmpp_2s": lambda **c: diffusers.DPMSolverSinglestepScheduler(**SD_BETAS, **c),
    "unipc": lambda **c: diffusers.UniPCMultistepScheduler(**SIGMAS, **c),
    "heun": lambda **c: diffusers.HeunDiscreteScheduler(**SIGMAS, **c),
    "dpm2": lambda **c: diffusers.KDPM2DiscreteScheduler(**SIGMAS, **c),
    "ours dpmpp_2m": lambda **c: ours("dpmpp_2m", **c),
    "ours dpm_2s": lambda **c: ours("dpm_2s", **c),
    # with noise of their own
    "ddpm": lambda **c: diffusers.DDPMScheduler(**PLAIN, **c),
    "euler ancestral": lambda **c: diffusers.EulerAncestralDiscreteScheduler(**SIGMAS, **c),
    "dpm2 ancestral": lambda **c: diffusers.KDPM2AncestralDiscreteScheduler(**SIGMAS, **c),
    "sde": lambda **c: diffusers.DPMSolverMultistepScheduler(**SIGMAS, **c, algorithm_type="sde-dpmsolver++"),
    "ours sde": lambda **c: ours("dpmpp_2m_sde", **c),
}


def ours(name: str, **config: Any) -> Any:
    return diffaccel.scheduler(name, diffusers.DDIMScheduler(**PLAIN, **config).config)


def editor_of(pipe: Any, **config: Any) -> SparseEditPipeline:
    """All steps sparse where they can be, and no fall back to dense."""
    return SparseEditPipeline(pipe, SparseEditConfig(**{"margin": 1, "dense_above": 1.0, "refresh": 2} | config))


def toy(name: str = "sd", scheduler: Any = None) -> tuple[Any, dict[str, Any]]:
    """A pipeline of its own, and the arguments of its call."""
    pipe, call = getattr(tiny, name)()
    pipe = copy.deepcopy(pipe)
    if scheduler is not None:
        pipe.scheduler = SCHEDULERS[scheduler]() if isinstance(scheduler, str) else scheduler
    if "image" in call:
        call["image"] = noise(1, 3, SIDE, SIDE, seed=1).sigmoid()
    if "mask_image" in call:
        call["mask_image"] = torch.zeros(1, 1, SIDE, SIDE)
        call["mask_image"][..., SIDE // 2 :] = 1
    if "height" in inspect.signature(type(pipe).__call__).parameters:
        call |= {"height": SIDE, "width": SIDE}
    return pipe, {**call, "num_inference_steps": STEPS}


def editor(name: str = "sd", scheduler: Any = None, **config: Any) -> tuple[SparseEditPipeline, dict[str, Any]]:
    """And the arguments of its reference."""
    pipe, call = toy(name, scheduler)
    return editor_of(pipe, **config), call


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def other(call: dict[str, Any]) -> dict[str, Any]:
    """Another prompt."""
    if "class_labels" in call:
        return {"class_labels": [7]}
    return {"prompt_embeds": noise(*call["prompt_embeds"].shape, seed=9)}


def inside(latents: Tensor, mask: np.ndarray = MASK) -> Tensor:
    """The mask as the latents are, packed for Flux: the toys' VAE does not downsample."""
    chosen = torch.from_numpy(mask)[None, None].float()
    if latents.ndim == 3:
        return F.max_pool2d(chosen, 2).flatten(1)[..., None].bool().expand_as(latents)
    return F.adaptive_max_pool2d(chosen, latents.shape[-2:]).bool().expand_as(latents)


class Latents(list[Tensor]):
    """The latents after each step: `callback_on_step_end` of a call."""

    def __call__(self, pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        self.append(given["latents"])
        return {}


def traces(pipe: Any) -> list[str]:
    """What sparse edits could leave behind."""
    found = [name for name in ("prepare_latents", "scheduler_step") if name in vars(pipe)]
    for part, network in pipe.components.items():
        if isinstance(network, nn.Module):
            for name, module in network.named_modules():
                found += [f"{part}.{name}.{key}" for key in ("forward", "_diffusers_hook") if key in vars(module)]
    return found
