"""The arguments of a pipeline's call: what an edit has as its reference, and what it changes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffaccel.hooking import hook_on
from diffaccel.kernels.region import read_mask
from diffaccel.samplers.policy.hook import NAME as POLICY

# An edit has them as the reference, or the outside of the mask would change, or they are the edit's own.
FIXED = (
    *("guidance_scale", "guidance_rescale", "true_cfg_scale", "image_guidance_scale", "eta", "num_inference_steps"),
    *("height", "width", "num_images_per_prompt", "timesteps", "sigmas", "latents", "mask_image", "output_type"),
    "return_dict",
)


def names(pipe: Any) -> list[str]:
    """Of the arguments that the pipeline takes."""
    return list(inspect.signature(type(pipe).__call__).parameters)[1:]


def named(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, with a generator, so that it can be repeated."""
    call = {**dict(zip(names(pipe), args, strict=False)), **kwargs}
    if call.get("generator") is None:
        call["generator"] = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))
    return call


def given(pipe: Any, picture: Any) -> dict[str, Any]:
    """The picture, where the pipeline begins with one; inpainting then keeps all of it."""
    asked = names(pipe)
    call = {"image": picture} if "image" in asked else {}
    return call | ({"mask_image": Image.new("L", (8, 8))} if "mask_image" in asked else {})


def edited(pipe: Any, call: dict[str, Any], conditions: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """The reference's call with other conditions.

    What inpainting has repainted in the reference stays repainted, so that there too the outside is the network's.
    """
    call = {**call, **conditions}
    for words, embedded in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
        if embedded in conditions and words not in conditions:
            call.pop(words, None)
    if "mask_image" in names(pipe):
        known = read_mask(call["mask_image"])
        both = known | read_mask(mask, (known.shape[1], known.shape[2]))
        call["mask_image"] = [Image.fromarray(one.astype(np.uint8) * 255) for one in both]
    return call


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; tensors and pictures if they are one object."""
    return a is b or (isinstance(a, int | float | str | tuple | list) and type(a) is type(b) and bool(a == b))


def refuse(pipe: Any, call: dict[str, Any]) -> None:
    """Raise for what mixes the whole picture outside of the network.

    Raises:
        ValueError: with what to leave out.
    """
    if call.get("guidance_rescale"):
        raise ValueError("guidance_rescale divides by a deviation of the whole picture, which edits change; leave it")
    if call.get("padding_mask_crop") is not None:
        raise ValueError("padding_mask_crop crops around the mask, which is another for each edit; leave it out")
    if pipe.scheduler.config.get("thresholding"):
        raise ValueError("thresholding=True takes quantiles of the whole picture, which edits change; switch it off")


def refuse_policy(network: nn.Module) -> None:
    """Raise if a policy chooses networks step by step: its other networks have no features of this one.

    Raises:
        ValueError: with what to do.
    """
    if hook_on(network, POLICY) is not None:
        raise ValueError("a policy (stitch, early_exit) chooses this pipeline's networks; take it off: handle.remove()")
