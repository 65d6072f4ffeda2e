"""The region of an edit decoded alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import diffaccel
from diffaccel import SparseEditConfig, SparseEditPipeline
from diffaccel.kernels.decoder import MARGIN
from tests.kernels.edits import MASK, Latents, editor, other, seed, toy

SIDE, CELL = 256, 8  # pixels, and pixels of a latent
REAL = np.zeros((SIDE, SIDE), bool)
REAL[96:136, 120:160] = True


@cache
def emoji() -> Any:
    pipe = diffaccel.zoo.load("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture() -> Image.Image:
    drawn = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(drawn)
    for i, colour in enumerate(("gold", "tomato", "seagreen", "royalblue", "orchid", "black")):
        pen.ellipse((10 + 40 * i, 20 + 35 * i, 70 + 40 * i, 80 + 35 * i), fill=colour, outline="black", width=3)
    return drawn


def full(pipe: Any, latents: Tensor) -> np.ndarray:
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(decoded, output_type="np")


def test_real_weights() -> None:
    """Near the full decoder in the mask, and beyond the box and its margin the reference's picture, to the bit."""
    pipe, latents = emoji(), Latents()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np", "callback_on_step_end": latents}
    with SparseEditPipeline(pipe, SparseEditConfig(reference="self", refresh=1)) as edit:
        before = edit.encode(picture(), "five circles", **call, generator=seed()).images
        painted = picture()
        ImageDraw.Draw(painted).rectangle((120, 96, 159, 135), fill="saddlebrown")
        after = edit.edit(REAL, image=painted, strength=0.5).images
        truth = full(pipe, latents[-1])
        reach = 8 * MARGIN
        beyond = np.ones_like(REAL)
        beyond[max(0, 96 - reach) : 136 + reach, max(0, 120 - reach) : 160 + reach] = False
        assert beyond.any()
        assert np.array_equal(after[0][beyond], before[0][beyond])
        assert np.abs(after - before)[0][REAL].mean() > 0.05  # there is something to see
        error = np.abs(after - truth)[0]
        assert error[REAL].max() < 0.02
        assert np.sqrt((error[REAL] ** 2).mean()) < 0.004
        assert edit.report.outside == 0
        edit.undo()
        exact = edit.edit(REAL, image=painted, strength=0.5, dense=True).images
        assert np.allclose(exact, truth, atol=1e-5)


def pictures(**config: Any) -> tuple[SparseEditPipeline, dict[str, Any], Latents]:
    """Larger than a margin, so that a region is not all of the picture."""
    latents = Latents()
    edit, call = editor("sd", **config)
    call |= {"output_type": "np", "height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
    return edit, call | {"callback_on_step_end": latents}, latents


def square(top: int, left: int) -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[top : top + 6, left : left + 6] = True
    return mask


def around(mask: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(mask)
    grown = np.zeros_like(mask)
    grown[max(0, ys.min() - MARGIN) : ys.max() + 1 + MARGIN, max(0, xs.min() - MARGIN) : xs.max() + 1 + MARGIN] = True
    return grown


def test_sequential_edits() -> None:
    """Each leaves the pictures of those before; an undone one nothing; a dense one is kept."""
    edit, call, latents = pictures()
    made = edit.generate(**call, generator=seed()).images
    masks = [square(4, 4), square(40, 40), square(4, 44)]
    first = edit.edit(masks[0], **other(call)).images
    second = edit.edit(masks[1], **other(call)).images
    assert np.array_equal(second[0][~around(masks[1])], first[0][~around(masks[1])])
    assert not np.array_equal(second[0][masks[1]], first[0][masks[1]])
    edit.undo()
    again = edit.edit(masks[1], **other(call)).images
    assert np.array_equal(again, second)
    edit.undo()
    dense = edit.edit(masks[1], **other(call), dense=True).images
    assert np.allclose(dense, full(edit.pipe, latents[-1]), atol=1e-6)
    third = edit.edit(masks[2], **other(call)).images
    assert np.array_equal(third[0][~around(masks[2])], dense[0][~around(masks[2])])
    assert not np.array_equal(third[0][masks[2]], made[0][masks[2]])


def test_two_pictures_with_two_masks() -> None:
    edit, call, latents = pictures()
    masks = [square(16, 16), square(40, 40)]
    call |= {"num_images_per_prompt": 2}
    made = edit.generate(**call, generator=seed()).images
    edited = edit.edit(masks, **other(call)).images
    truth = full(edit.pipe, latents[-1])
    for row, mask in enumerate(masks):
        assert np.array_equal(edited[row][~around(mask)], made[row][~around(mask)])
        assert np.abs(edited - truth)[row][mask].max() < 0.1 * np.abs(edited - made)[row][mask].max()


@pytest.mark.parametrize("count", [1, 2])
def test_slicing(count: int) -> None:
    """A call for each picture: the same as without, with one mask for all or one for each."""
    masks = [square(16, 16), square(40, 40)][:count]
    results = []
    for sliced in (False, True):
        edit, call, _ = pictures()
        if sliced:
            edit.pipe.vae.enable_slicing()
        edit.generate(**call, num_images_per_prompt=2, generator=seed())
        results.append(edit.edit(masks, **other(call)).images)
    assert np.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "between", "only before"])
def test_tiling_runs_dense(when: str) -> None:
    """A tile is no region of the picture; also when it is switched on or off between edits."""
    edit, call, latents = pictures()
    vae = edit.pipe.vae
    vae.tile_sample_min_size = vae.tile_latent_min_size = 32
    if when != "between":
        vae.enable_tiling()
    edit.generate(**call, generator=seed())
    if when == "between":
        vae.enable_tiling()
    elif when == "only before":
        vae.disable_tiling()
    edited = edit.edit(square(4, 4), **other(call)).images
    assert np.allclose(edited, full(edit.pipe, latents[-1]), atol=1e-6)
    vae.disable_tiling()
    again = edit.edit(square(40, 40), **other(call)).images
    assert np.allclose(again, full(edit.pipe, latents[-1]), atol=1e-6)
    edit.generate(**call, generator=seed())
    edit.edit(square(4, 4), **other(call))
    assert edit._decoder is not None
    assert edit._decoder.handle.engine.cache.bytes() > 0


def test_a_mask_of_the_whole_picture() -> None:
    edit, call, latents = pictures()
    edit.generate(**call, generator=seed())
    edited = edit.edit(np.ones((64, 64), bool), **other(call)).images
    assert np.allclose(edited, full(edit.pipe, latents[-1]), atol=1e-6)
    once = edit.edit(square(4, 4)).images  # with what that one left
    assert np.array_equal(once[0][~around(square(4, 4))], edited[0][~around(square(4, 4))])


def test_without_a_region_of_its_own() -> None:
    edit, call, latents = pictures(vae=False)
    edit.generate(**call, generator=seed())
    edited = edit.edit(square(4, 4), **other(call)).images
    assert np.allclose(edited, full(edit.pipe, latents[-1]), atol=1e-6)
    assert "_diffusers_hook" not in vars(edit.pipe.vae.decoder)


def test_other_decoders_stay_dense() -> None:
    pipe, call = toy("sd")
    pipe.vae = diffusers.AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )
    with SparseEditPipeline(pipe, SparseEditConfig(dense_above=1.0)) as edit:
        made = edit.generate(**call | {"output_type": "np"}, generator=seed()).images
        assert not np.array_equal(edit.edit(MASK, **other(call)).images, made)
        painted = np.where(MASK[None, :, :, None], 1 - made, made)
        once = edit.edit(MASK, strength=0.5).images
        edit.undo()
        assert not np.array_equal(edit.edit(MASK, strength=0.5, image=painted).images, once)
