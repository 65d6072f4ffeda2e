"""Edits one after the other, undone, accepted, offloaded; and what is left on a pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from diffaccel import SparseEditPipeline
from tests.kernels.edits import ELSEWHERE, MASK, Latents, editor, editor_of, inside, other, seed, toy, traces
from tests.tiny import noise, relative


def test_edits_build_on_each_other() -> None:
    edit, call = editor()
    made = edit.generate(**call, generator=seed())[0]
    first = edit.edit(MASK, **other(call))[0]
    second = edit.edit(ELSEWHERE, strength=0.6, **other(call))[0]
    assert torch.equal(second[~inside(made, ELSEWHERE)], first[~inside(made, ELSEWHERE)])
    assert not torch.equal(second, first)
    third = edit.edit(ELSEWHERE, strength=0.3, generator=seed(5))[0]
    assert torch.equal(third[inside(made)], first[inside(made)])
    untouched = ~inside(made, MASK | ELSEWHERE)
    assert torch.equal(third[untouched], made[untouched])


def test_undo_brings_everything_back() -> None:
    edit, call = editor()
    made = edit.generate(**call, generator=seed())[0]
    first = edit.edit(MASK, **other(call))[0]
    features = {key: {name: value.clone() for name, value in slot.items()} for key, slot in slots(edit).items()}
    second = edit.edit(ELSEWHERE, **other(call), generator=seed(1))[0]
    assert edit.picture is second
    edit.undo()
    assert edit.picture is first
    assert torch.equal(edit.edit(ELSEWHERE, **other(call), generator=seed(1))[0], second)
    edit.undo()
    assert torch.equal(edit.edit(ELSEWHERE)[0][inside(made)], first[inside(made)])
    edit.undo()
    for key, slot in slots(edit).items():  # the first edit is in, and no other
        assert slot.keys() == features[key].keys()
        changed = [name for name, value in slot.items() if not torch.equal(value, features[key][name])]
        assert changed
        assert not slot.pending
    with pytest.raises(RuntimeError, match="there is no edit to undo"):
        edit.undo()


def slots(edit: SparseEditPipeline) -> dict[Any, Any]:
    return edit.handle.engine.cache._slots


def test_accept() -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    edit.accept()  # nothing to do
    once = edit.edit(MASK, **other(call))[0]
    edit.accept()
    with pytest.raises(RuntimeError, match="there is no edit to undo"):
        edit.undo()
    # with that noise, state and features of the mask, nothing changes
    assert relative(edit.edit(MASK, **other(call))[0], once) < 1e-5


def test_a_new_reference_forgets_the_old() -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    edit.edit(MASK, **other(call))
    made = edit.generate(**call, generator=seed(3))[0]
    assert edit.report is None
    with pytest.raises(RuntimeError, match="there is no edit to undo"):
        edit.undo()
    alone, _ = editor()
    assert torch.equal(alone.generate(**call, generator=seed(3))[0], made)
    assert torch.equal(alone.edit(MASK, **other(call))[0], edit.edit(MASK, **other(call))[0])


def test_the_pipeline_s_own_calls() -> None:
    """Arguments by position, without a generator, and tuples; between edits the pipeline is its own."""
    edit, call = editor()
    state = torch.get_rng_state()
    result = edit.generate(**call, return_dict=False)
    assert isinstance(result, tuple)
    torch.set_rng_state(state)
    assert torch.equal(edit.generate(None, **call).images, result[0])
    plain = edit.pipe(**call, generator=seed(4)).images
    assert torch.equal(edit.edit(MASK).images[~inside(plain)], result[0][~inside(plain)])
    edit.remove()
    assert torch.equal(edit.pipe(**call, generator=seed(4)).images, plain)


@pytest.mark.parametrize("off", ["guidance", "negative prompt"])
def test_without_guidance_and_with_a_negative_prompt(off: str) -> None:
    edit, call = editor()
    if off == "guidance":
        call |= {"guidance_scale": 1.0}
    made = edit.generate(**call, generator=seed())[0]
    change = other(call) if off == "guidance" else {"negative_prompt_embeds": noise(1, 4, 8, seed=11)}
    edited = edit.edit(MASK, **change)[0]
    assert torch.equal(edited[~inside(made)], made[~inside(made)])
    assert not torch.equal(edited, made)


def test_guidance_in_two_calls_of_the_network() -> None:
    """As video pipelines, and SD3's that skips layers, do: the second call of a step has features of its own."""
    pipe, call = toy("sd3")
    edit = editor_of(pipe, margin=16)
    call |= {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    made = edit.generate(**call, generator=seed())[0]
    assert {number for _, number in edit.reference.outputs} == {0, 1}
    edited = edit.edit(MASK, **other(call))[0]
    assert torch.equal(edited[~inside(made)], made[~inside(made)])
    edit.undo()
    assert relative(edited, edit.edit(MASK, **other(call), dense=True)[0]) < 1e-4


def test_two_pictures_with_two_masks() -> None:
    """Each as if it were alone, where their boxes have one size."""
    edit, call = editor(margin=2)
    made = edit.generate(**call, num_images_per_prompt=2, generator=[seed(0), seed(1)])[0]
    masks = [MASK, MASK[::-1, ::-1].copy()]
    edited = edit.edit(masks, **other(call))[0]
    for row, mask in enumerate(masks):
        alone, _ = editor(margin=2)
        alone.generate(**call, generator=seed(row))
        assert relative(edited[row], alone.edit(mask, **other(call))[0][0]) < 1e-4
        within = inside(made[:1], mask)[0]
        assert torch.equal(edited[row][~within], made[row][~within])


def test_removed_without_a_trace() -> None:
    pipe, call = toy()
    before = pipe(**call | {"output_type": "np"}, generator=seed())[0]
    assert traces(pipe) == []
    with editor_of(pipe) as edit:
        assert np.array_equal(edit.generate(**call | {"output_type": "np"}, generator=seed())[0], before)
        assert "prepare_latents" not in vars(pipe)
        edit.edit(MASK, **other(call))
        assert len(traces(pipe)) > 20
        plain = pipe(**call | {"output_type": "np"}, generator=seed())[0]  # of the editor nothing is seen
        assert np.array_equal(plain, before)
    assert traces(pipe) == []
    assert edit.handle.engine.cache.bytes() == 0
    assert np.array_equal(pipe(**call | {"output_type": "np"}, generator=seed())[0], before)
    edit.remove()


class Interrupts(Latents):
    """Raises after some steps, as a user that presses Ctrl-C."""

    def __init__(self, after: int | None):
        super().__init__()
        self.after = after

    def __call__(self, *given: Any) -> dict[str, Any]:
        if self.after is not None and len(self) == self.after:
            raise KeyboardInterrupt
        return super().__call__(*given)


@pytest.mark.parametrize("reference", ["record", "self"])
def test_interrupted(reference: Any) -> None:
    """While generating there is no reference then; while editing the one before stays."""
    edit, call = editor(reference=reference)
    stop = Interrupts(None)
    call |= {"callback_on_step_end": stop}
    made = edit.generate(**call, generator=seed())[0]
    want = edit.edit(MASK, strength=0.5, **other(call))[0]
    edit.undo()
    stop.clear()
    stop.after = 3
    with pytest.raises(KeyboardInterrupt):
        edit.edit(ELSEWHERE, **other(call))
    assert edit.handle.engine.driver is None
    assert edit.handle.engine.mode == "off"
    assert "prepare_latents" not in vars(edit.pipe)
    assert edit.picture is made
    with pytest.raises(RuntimeError, match="there is no edit to undo"):
        edit.undo()
    stop.after = None
    assert torch.equal(edit.edit(MASK, strength=0.5, **other(call))[0], want)
    edit.accept()
    if reference == "record":  # of the interrupted edit nothing was accepted
        alone, _ = editor()
        alone.generate(**call, generator=seed())
        alone.edit(MASK, strength=0.5, **other(call))
        assert torch.equal(alone.edit(MASK)[0], edit.edit(MASK)[0])
    stop.clear()
    stop.after = 2
    with pytest.raises(KeyboardInterrupt):
        edit.generate(**call, generator=seed())
    with pytest.raises(RuntimeError, match="nothing to edit yet"):
        edit.edit(MASK)
    assert edit.handle.engine.cache.bytes() == 0
    stop.after = None
    assert torch.equal(edit.generate(**call, generator=seed())[0], made)


@pytest.mark.parametrize("how", ["model", "sequential"])
@pytest.mark.parametrize("first", ["offload", "edits"])
def test_offloaded_networks(how: str, first: str) -> None:
    """Accelerate's hooks stay outside, and are put on anew after each run."""
    edit, call = editor()
    call |= {"output_type": "np"}
    made = edit.generate(**call, generator=seed()).images
    painted = np.where(MASK[None, :, :, None], 1 - made, made)
    want = edit.edit(MASK, strength=0.5, image=painted, **other(call)).images

    def offload() -> None:
        if how == "model":
            return pipe.enable_model_cpu_offload(device="cpu")
        for part in (pipe.unet, pipe.vae):
            cpu_offload(part, torch.device("cpu"), offload_buffers=True)

    pipe, _ = toy()
    if first == "offload":
        offload()
    edit = editor_of(pipe)
    if first == "edits":
        offload()
    for _ in range(2):
        assert np.array_equal(edit.generate(**call, generator=seed()).images, made)
        assert np.array_equal(edit.edit(MASK, strength=0.5, image=painted, **other(call)).images, want)
    edit.remove()
    assert np.array_equal(pipe(**call, generator=seed()).images, made)
    assert not any("_diffusers_hook" in vars(module) for module in pipe.unet.modules())
