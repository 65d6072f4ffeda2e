"""Edits on every kind of pipeline and scheduler: outside of the mask nothing changes, to the bit."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import diffaccel
from tests.kernels.edits import (
    ELSEWHERE,
    MASK,
    SCHEDULERS,
    SIDE,
    STEPS,
    editor,
    editor_of,
    inside,
    other,
    seed,
    toy,
)
from tests.pruning.toys import toy as network_toy
from tests.tiny import SD_BETAS, noise, relative

MAPS = ("sd", "sd_img2img", "sd_inpaint", "sdxl", "sdxl_img2img", "sdxl_inpaint", "playground")
TOKENS = ("pixart", "sd3", "sd3_img2img", "sd3_inpaint", "flux", "flux_img2img", "flux_inpaint")
CLOSE = 1e-5


def unchanged_outside(made: Any, edited: Any, mask: np.ndarray = MASK) -> None:
    within = inside(made, mask)
    assert torch.equal(edited[~within], made[~within])
    assert not torch.equal(edited[within], made[within])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler(scheduler: str) -> None:
    """The same edit twice is the same; no change is none; new noise and fewer steps stay in the mask."""
    edit, call = editor("sd", scheduler)
    made = edit.generate(**call, generator=seed())[0]
    edited = edit.edit(MASK, **other(call))[0]
    unchanged_outside(made, edited)
    edit.undo()
    assert torch.equal(edit.edit(MASK, **other(call))[0], edited)
    edit.undo()
    assert relative(edit.edit(MASK)[0], made) < CLOSE
    edit.undo()
    unchanged_outside(made, edit.edit(MASK, strength=0.5, generator=seed(1))[0])


@pytest.mark.parametrize("reference", ["record", "self"])
@pytest.mark.parametrize("name", [*MAPS, *TOKENS])
def test_every_pipeline(name: str, reference: Any) -> None:
    edit, call = editor(name, reference=reference)
    made = edit.generate(**call, generator=seed())[0]
    edited = edit.edit(MASK, **other(call))[0]
    unchanged_outside(made, edited)
    edit.undo()
    assert torch.equal(edit.edit(MASK, **other(call))[0], edited)
    edit.undo()
    if reference == "record" and "inpaint" not in name:  # the mask is not the one that was repainted
        assert relative(edit.edit(MASK)[0], made) < CLOSE
        edit.undo()
    unchanged_outside(made, edit.edit(ELSEWHERE, strength=0.5, **other(call))[0], ELSEWHERE)


@pytest.mark.parametrize("name", ["sd_inpaint", "sdxl_inpaint", "sd3_inpaint", "flux_inpaint"])
def test_what_inpainting_repainted_stays(name: str) -> None:
    """Also after an edit elsewhere was accepted: the mask of the pipeline grows."""
    edit, call = editor(name)
    made = edit.generate(**call, generator=seed())[0]
    once = edit.edit(MASK, **other(call))[0]
    twice = edit.edit(ELSEWHERE, **other(call))[0]
    unchanged_outside(once, twice, ELSEWHERE)
    third = edit.edit(np.roll(MASK, 8, 1), **other(call))[0]
    unchanged_outside(twice, third, np.roll(MASK, 8, 1))
    assert not torch.equal(made, third)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "ddpm"])
def test_dit(scheduler: str) -> None:
    """It prepares no latents, and hands its generator not on to the scheduler: DDPM draws from PyTorch's own."""
    pipe, call = toy("dit", scheduler)
    edit, decoded = editor_of(pipe, margin=1), []
    pipe.vae.post_quant_conv.register_forward_pre_hook(lambda module, args: decoded.append(args[0]))
    mask = MASK[:8, :8].copy()
    edit.generate(**call, generator=seed())
    state = torch.get_rng_state()
    edit.edit(mask, class_labels=[7])
    assert torch.equal(torch.get_rng_state(), state)
    unchanged_outside(decoded[0], decoded[1], mask)
    edit.undo()
    edit.edit(mask)
    assert relative(decoded[2], decoded[0]) < CLOSE
    with pytest.raises(TypeError, match="prepares no latents"):
        edit.edit(mask, generator=seed(1))
    with pytest.raises(TypeError, match="prepares no latents"):
        edit.encode(noise(1, 3, 8, 8).sigmoid())


def test_flow_with_noise_of_its_own() -> None:
    """SD3 hands its generator not on to the scheduler either."""
    pipe, call = toy("sd3")
    pipe.scheduler = diffaccel.scheduler("dpmpp_2m_sde", pipe.scheduler.config)
    edit = editor_of(pipe)
    made = edit.generate(**call, generator=seed())[0]
    unchanged_outside(made, edit.edit(MASK, **other(call))[0])


@pytest.mark.parametrize("kind", [diffusers.DDPMPipeline, diffusers.DDIMPipeline])
def test_pixel_models(kind: Any) -> None:
    """No prompt, no latents, and a network that is called by position; what changes here is the network."""
    scheduler = SCHEDULERS["ddpm" if kind is diffusers.DDPMPipeline else "ddim"]()
    pipe = kind(network_toy("unconditional"), scheduler)
    pipe.set_progress_bar_config(disable=True)
    edit = editor_of(pipe, margin=2)
    call = {"num_inference_steps": STEPS, "output_type": "np", "batch_size": 2}
    made = torch.as_tensor(edit.generate(**call, generator=seed()).images).movedim(-1, 1)
    masks = np.stack([MASK, ELSEWHERE])
    same = torch.as_tensor(edit.edit(masks).images).movedim(-1, 1)
    assert relative(same, made) < CLOSE
    edit.undo()
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.05
    edited = torch.as_tensor(edit.edit(masks).images).movedim(-1, 1)
    for row, mask in enumerate(masks):
        unchanged_outside(made[row][None], edited[row][None], mask)
    with pytest.raises(TypeError, match="prepares no latents"):
        edit.edit(masks, generator=seed(1))


def test_inpainting_with_nine_channels() -> None:
    """The network sees the mask, and the picture without what is in it."""
    pipe, call = toy("sd_inpaint")
    torch.manual_seed(0)
    pipe.unet = type(pipe.unet)(**{**pipe.unet.config, "in_channels": 9}).eval()
    edit = editor_of(pipe)
    made = edit.generate(**call, generator=seed())[0]
    once = edit.edit(MASK, **other(call))[0]
    unchanged_outside(made, once)
    unchanged_outside(once, edit.edit(ELSEWHERE, **other(call))[0], ELSEWHERE)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "ours dpmpp_2m"])
def test_image_to_image_begins_late(scheduler: str) -> None:
    """Three of the five steps are run, and a strength is a share of these."""
    edit, call = editor("sd_img2img", scheduler)
    edit.generate(**call, generator=seed())
    edit.edit(MASK, **other(call))
    assert edit.report.calls == {"sparse": 3}
    edit.edit(MASK, strength=1 / 3, **other(call))
    assert edit.report.calls == {"sparse": 1, "replayed": 2}


def test_controlnet() -> None:
    """Its maps are of the whole picture, and the network's of the region."""
    pipe, call = toy("sd")
    torch.manual_seed(0)
    control: Any = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_channels=3)
    for part in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        torch.nn.init.normal_(part.weight, std=0.3)  # they begin with zeros
    control.controlnet_cond_embedding = Shallow()
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=control.eval(), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    call |= {"image": noise(1, 3, SIDE, SIDE, seed=5).sigmoid()}
    edit = editor_of(pipe, norm="incremental", margin=SIDE)
    made = edit.generate(**call, generator=seed())[0]
    edited = edit.edit(MASK, **other(call))[0]
    unchanged_outside(made, edited)
    edit.undo()
    dense = edit.edit(MASK, **other(call), dense=True)[0]
    assert relative(edited, dense) < 1e-4
    edit.undo()
    without = edit.edit(MASK, **other(call), dense=True, controlnet_conditioning_scale=0.0)[0]
    assert relative(without, dense) > 1e-3


class Shallow(torch.nn.Conv2d):
    """In place of the embedding of ControlNet's picture, which divides sides by 8."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3, padding=1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"guidance_rescale": 0.7}, "guidance_rescale"),
        ({"scheduler": lambda: diffusers.DDIMScheduler(**SD_BETAS, thresholding=True)}, "thresholding"),
    ],
)
def test_what_mixes_the_whole_picture_is_refused(change: dict[str, Any], sentence: str) -> None:
    scheduler = change.pop("scheduler", lambda: None)()
    edit, call = editor("sd", scheduler)
    with pytest.raises(ValueError, match=sentence):
        edit.generate(**call, **change)
    with pytest.raises(ValueError, match=sentence):
        edit.encode(noise(1, 3, SIDE, SIDE).sigmoid(), **call, **change)


def test_crops_of_inpainting_are_refused() -> None:
    edit, call = editor("sd_inpaint")
    with pytest.raises(ValueError, match="padding_mask_crop"):
        edit.generate(**call, padding_mask_crop=4)
