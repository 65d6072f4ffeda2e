"""What an editor refuses, and that it is as it was afterwards."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import diffaccel
from tests.kernels.edits import MASK, STEPS, editor, editor_of, inside, other, seed, toy, traces
from tests.tiny import noise


def test_editing_nothing() -> None:
    edit, call = editor()
    with pytest.raises(RuntimeError, match="nothing to edit yet"):
        edit.edit(MASK)
    with pytest.raises(RuntimeError, match="there is no edit to undo"):
        edit.undo()
    edit.generate(**call, generator=seed())
    for mask, sentence in (
        (np.zeros_like(MASK), "the mask is empty"),
        ([MASK, np.zeros_like(MASK)], "the mask is empty"),
        ([MASK] * 3, "3 masks for 1 pictures"),
    ):
        with pytest.raises(ValueError, match=sentence):
            edit.edit(mask)
    for strength in (0, -1, 1.1):
        with pytest.raises(ValueError, match="give a share of the steps"):
            edit.edit(MASK, strength=strength)


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 9.0},
        {"num_inference_steps": 4},
        {"height": 8},
        {"num_images_per_prompt": 2},
        {"eta": 0.5},
        {"guidance_rescale": 0.5},
        {"output_type": "pil"},
        {"latents": noise(1, 4, 16, 16)},
        {"timesteps": [900, 1]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arguments_of_the_reference_stay(change: dict[str, Any]) -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    with pytest.raises(ValueError, match=f"{next(iter(change))} is the reference's"):
        edit.edit(MASK, **change)
    edit.edit(MASK, **{name: call[name] for name in change if name in call})  # the same is none


def test_latents_of_the_reference_are_its_own() -> None:
    """Tensors have no truth value."""
    edit, call = editor()
    latents = noise(1, 4, 16, 16, seed=4)
    made = edit.generate(**call, latents=latents)[0]
    with pytest.raises(ValueError, match="latents is the reference's"):
        edit.edit(MASK, latents=latents + 1)
    edited = edit.edit(MASK, latents=latents, **other(call))[0]
    assert torch.equal(edited[~inside(made)], made[~inside(made)])


def test_guidance_switched_off_is_refused_and_leaves_the_edits_as_they_were() -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    want = edit.edit(MASK, **other(call))[0]
    edit.undo()
    pipe_call = edit._call
    edit._call = {**pipe_call, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="batches of 2, and the edit has 1"):
        edit.edit(MASK)
    edit._call = {**pipe_call, "num_inference_steps": STEPS + 1}
    with pytest.raises(ValueError, match="no network call 1 at step 6"):
        edit.edit(MASK)
    edit._call = pipe_call
    assert torch.equal(edit.edit(MASK, **other(call))[0], want)


def test_a_policy_and_sparse_edits_do_not_go_together() -> None:
    pipe, call = toy()
    small = copy.deepcopy(pipe.unet)
    edit = editor_of(pipe)
    made = edit.generate(**call, generator=seed())[0]
    with diffaccel.stitch(pipe, small, 0.5):
        with pytest.raises(ValueError, match="a policy"):
            edit.edit(MASK)
        with pytest.raises(ValueError, match="a policy"):
            edit.generate(**call, generator=seed())
    edit.generate(**call, generator=seed())
    assert torch.equal(edit.edit(MASK)[0][~inside(made)], made[~inside(made)])
    edit.remove()
    with diffaccel.stitch(pipe, small, 0.5), pytest.raises(ValueError, match="a policy"):
        editor_of(pipe)
    assert traces(pipe) == []


def test_a_second_editor_is_refused_and_takes_nothing_along() -> None:
    pipe, call = toy()
    edit = editor_of(pipe)
    with pytest.raises(ValueError, match="has sparse edits already"):
        editor_of(pipe)
    shares = type(pipe)(**{**pipe.components, "unet": copy.deepcopy(toy()[0].unet)}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="has sparse edits already"):
        editor_of(shares)  # the VAE has
    assert "_diffusers_hook" not in vars(shares.unet)
    edit.generate(**call, generator=seed())
    edit.edit(MASK)
    edit.remove()
    editor_of(shares).remove()
    assert traces(shares) == []


def test_copies_are_refused() -> None:
    edit, _ = editor()
    for original in (edit.pipe, edit.pipe.unet, edit.pipe.vae):
        with pytest.raises(ValueError, match="cannot be copied"):
            copy.deepcopy(original)
    edit.remove()
    copy.deepcopy(edit.pipe)


def test_a_pipeline_without_its_network() -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    network, edit.pipe.unet = edit.pipe.unet, copy.deepcopy(toy()[0].unet)
    with pytest.raises(RuntimeError, match="no sparse edits any more"):
        edit.edit(MASK)
    edit.pipe.unet = network
    edit.edit(MASK)
    edit.remove()
    for again in (lambda: edit.edit(MASK), lambda: edit.generate(**call)):
        with pytest.raises(RuntimeError, match="no sparse edits any more"):
            again()
