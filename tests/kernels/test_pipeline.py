"""Edits one after the other, undone and accepted, refused and interrupted; and what is left on a pipeline."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import diffaccel
from diffaccel import SparseEditConfig, SparseEditPipeline
from tests.kernels.edits import ELSEWHERE, MASK, STEPS, Latents, editor, editor_of, inside, other, seed, toy
from tests.tiny import noise, relative


def traces(pipe: Any) -> list[str]:
    """What sparse edits could leave behind."""
    found = [name for name in ("prepare_latents", "scheduler_step") if name in vars(pipe)]
    for part, network in pipe.components.items():
        if isinstance(network, nn.Module):
            for name, module in network.named_modules():
                found += [f"{part}.{name}.{key}" for key in ("forward", "_diffusers_hook") if key in vars(module)]
    return found


# One after the other


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
        assert changed and all(not value for value in (slot.pending,))
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
    assert torch.equal(edited[~inside(made)], made[~inside(made)]) and not torch.equal(edited, made)


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
    masks = [MASK, np.roll(MASK, (6, 4), (0, 1))]
    edited = edit.edit(masks, **other(call))[0]
    for row, mask in enumerate(masks):
        alone, _ = editor(margin=2)
        alone.generate(**call, generator=seed(row))
        assert relative(edited[row], alone.edit(mask, **other(call))[0][0]) < 1e-4
        within = inside(made[:1], mask)[0]
        assert torch.equal(edited[row][~within], made[row][~within])


# Refused


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


# What is left


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
    assert traces(pipe) == [] and edit.handle.engine.cache.bytes() == 0
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
    assert edit.handle.engine.driver is None and edit.handle.engine.mode == "off"
    assert "prepare_latents" not in vars(edit.pipe) and edit.picture is made
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


# Memory, and the report


def test_memory_limit() -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    needed = edit.handle.engine.cache.bytes()
    edit.remove()
    calls: list[Tensor] = []
    pipe, _ = toy()
    tight = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=needed - 1))
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    with pytest.raises(MemoryError, match=f"the features of {STEPS} network calls take .* MiB"):
        tight.generate(**call, generator=seed())
    assert len(calls) == 1 and tight.handle.engine.cache.bytes() == 0
    with pytest.raises(RuntimeError, match="nothing to edit yet"):
        tight.edit(MASK)
    tight.generate(**call | {"num_inference_steps": 2}, generator=seed())
    tight.edit(MASK)
    tight.remove()
    exact = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=needed))
    exact.generate(**call, generator=seed())
    exact.remove()
    half = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=int(needed * 0.6), cache_dtype=torch.float16))
    half.generate(**call, generator=seed())
    half.remove()
    own = SparseEditPipeline(pipe, SparseEditConfig(memory_limit=needed // STEPS, reference="self"))
    own.generate(**call, generator=seed())
    own.edit(MASK)


def test_image_to_image_needs_memory_for_its_own_steps() -> None:
    pipe, call = toy("sd_img2img")
    edit = editor_of(pipe)
    edit.generate(**call, generator=seed())
    needed = edit.handle.engine.cache.bytes()
    edit.remove()
    editor_of(pipe, memory_limit=needed).generate(**call, generator=seed())


def test_half_features() -> None:
    """Features are kept in float16, and outputs are not: outside nothing changes."""
    full, call = editor()
    half, _ = editor(cache_dtype=torch.float16)
    made = full.generate(**call, generator=seed())[0]
    assert torch.equal(half.generate(**call, generator=seed())[0], made)
    sparse, rounded = (edit.edit(MASK, **other(call))[0] for edit in (full, half))
    assert torch.equal(rounded[~inside(made)], made[~inside(made)])
    assert 0 < relative(rounded, sparse) < 1e-2
    assert half.report.memory < 0.6 * full.report.memory


def test_report() -> None:
    pipe, call = toy()
    edit = editor_of(pipe, margin=1)
    call |= {"output_type": "np"}
    before = edit.generate(**call, generator=seed()).images
    after = edit.edit(MASK, strength=0.5, **other(call)).images
    report = edit.report
    assert report.calls == {"replayed": 2, "sparse": 3} and report.share == (4 + 2) ** 2 / 16**2
    assert set(report.call_seconds) == {"reference", "sparse"}
    assert report.speedup == report.dense_seconds / report.seconds
    assert report.speedup_with_reference == report.dense_seconds / (report.seconds + report.reference_seconds)
    saved = 3 * (report.call_seconds["reference"] - report.call_seconds["sparse"])
    assert abs(report.dense_seconds - report.seconds - saved) < 0.5 * report.seconds + abs(saved)
    change = np.abs(after - before).max(-1)[0]
    grown = np.zeros_like(MASK)
    grown[0:14, 0:16] = True  # 8 pixels around
    assert report.seam == pytest.approx(np.sqrt((change[grown & ~MASK] ** 2).mean()), rel=1e-4)
    assert report.outside == 0  # there is nothing as far as that
    assert report.region.draw(edit.pipe.image_processor.numpy_to_pil(before)[0]).size == (16, 16)
    text = str(report)
    for words in ("3 sparse", "2 replayed", "14% of the picture", f"{report.memory / 2**20:,.0f} MiB", "seam: "):
        assert words in text
    assert report.memory == edit.handle.engine.cache.bytes()
    edit.undo()
    edit.edit(MASK, dense=True, **other(call))
    report = edit.report
    assert report.dense_seconds == report.seconds and report.share == 1 and report.region is None
    assert "dense" in str(report) and "probe" not in str(report)


def test_report_of_latents() -> None:
    edit, call = editor()
    edit.generate(**call, generator=seed())
    edit.edit(MASK)
    assert edit.report.seam is None and edit.report.outside is None and "seam" not in str(edit.report)
