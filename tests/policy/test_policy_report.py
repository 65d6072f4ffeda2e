"""What a report says is what a FLOP counter sees while the pipeline runs."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import diffaccel
from diffaccel.cost import macs, network_calls, peak_memory
from diffaccel.samplers.policy import FULL, Handle, Report, attach
from tests.policy import KINDS, Fixed, calls, like, smaller, toy
from tests.tiny import SD_BETAS, draw, noise


def counted(toy: Any, steps: int, **call: Any) -> int:
    """Multiply-accumulates of a whole run; the pipelines here have no text encoder, and no VAE works."""
    return macs(lambda: draw(toy, toy[0].scheduler, steps, **call))


def check(handle: Handle, toy: Any, steps: int, pictures: int = 1, **call: Any) -> Report:
    spent = counted(toy, steps, **call)
    report = handle.report()
    assert report.pictures == pictures
    assert report.macs == spent / pictures
    assert report.planned == pytest.approx(report.macs, rel=1e-9)
    handle.remove()
    assert report.full == pytest.approx(counted(toy, steps, **call) / pictures, rel=1e-9)
    assert report.macs < report.full
    return report


@pytest.mark.parametrize("name", [*(kind for kind in KINDS if kind != "dit"), "wan", "sana"])
def test_spent_and_planned_are_what_was_computed(name):
    pipe, call = toy(name)
    check(diffaccel.stitch(pipe, smaller(pipe), 0.5), (pipe, call), 4)


def test_network_alone_where_a_vae_works():
    """DiT's pipeline decodes always: the report is of the networks."""
    pipe, call = toy("dit")
    handle = diffaccel.stitch(pipe, smaller(pipe), 0)
    draw((pipe, call), pipe.scheduler, 2)
    sample, labels = torch.zeros(2, 4, 8, 8), torch.tensor([3, 1000])
    assert handle.report().macs == 2 * macs(pipe.transformer, sample, torch.zeros(2), labels)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_several_pictures(name):
    """Per picture, both halves of guidance counted."""
    pipe, call = toy(name)
    check(diffaccel.stitch(pipe, smaller(pipe)), (pipe, call), 5, pictures=3, num_images_per_prompt=3)


def test_two_pictures_without_guidance():
    """Two rows that are not alike are two pictures, and no guidance."""
    pipe, call = toy("sd")
    handle = diffaccel.stitch(pipe, smaller(pipe))
    check(handle, (pipe, call), 5, pictures=2, num_images_per_prompt=2, guidance_scale=1.0)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_samples_of_their_own(name):
    pipe, call = toy(name)
    table = (("small", FULL, FULL), ("small", "small", FULL))
    handle = attach(pipe, Fixed(table), {"small": smaller(pipe)})
    report = check(handle, (pipe, call), 2, pictures=3, num_images_per_prompt=3)
    assert report.calls == {"small": 2, FULL: 2}


def test_image_to_image_makes_only_its_steps():
    """Latents as picture: the VAE has no part in it."""
    pipe, call = toy("sd_img2img")
    call["image"] = noise(1, 4, 8, 8)
    check(diffaccel.stitch(pipe, smaller(pipe), 0.6), (pipe, call), 10)


def test_steps_of_second_order():
    pipe, call = toy("sd")
    pipe.scheduler = diffusers.HeunDiscreteScheduler(**SD_BETAS)
    report = check(diffaccel.stitch(pipe, smaller(pipe)), (pipe, call), 5)
    assert report.calls == {"small": 3, FULL: 6}  # of 9


def test_interrupted_run():
    pipe, call = toy("sd")

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return kwargs

    handle = diffaccel.stitch(pipe, smaller(pipe))
    spent = counted((pipe, call), 10, callback_on_step_end=stop)
    report = handle.report()
    assert report.macs == spent < report.planned
    assert report.calls == {"small": 3}


def test_only_the_last_run_counts():
    pipe, call = toy("sd")
    with diffaccel.stitch(pipe, smaller(pipe)) as handle:
        for steps in (10, 5):
            draw((pipe, call), pipe.scheduler, steps)
        assert calls(handle) == {"small": 2, FULL: 3}
    with network_calls(pipe) as count:
        draw((pipe, call), pipe.scheduler, 5)
    assert count.calls == 5
    assert calls(handle) == {"small": 2, FULL: 3}  # that run was plain


def test_in_words():
    pipe, call = toy("sd")
    with diffaccel.stitch(pipe, smaller(pipe)) as handle:
        with pytest.raises(RuntimeError, match="no picture was drawn with this policy yet; call the pipeline first"):
            handle.report()
        draw((pipe, call), pipe.scheduler, 5)
        report = handle.report()
    assert str(report).startswith("2 x small, 3 x full: ")
    assert f"{report.macs / report.full:.1%} of the whole network's" in str(report)


def test_networks_are_counted_without_their_numbers():
    """The meta device computes nothing, and the weights are not copied: 100 MB of them would show."""
    pipe, _ = toy("sd3")
    wide = {"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}
    with torch.device("meta"):
        meta = like(pipe.transformer, **wide)
    large = meta.to_empty(device="cpu")
    before = {key: weight.data_ptr() for key, weight in large.state_dict().items()}
    pipe.transformer = large
    handle = attach(pipe, Fixed(((FULL,),)), {})
    hook = handle._hook
    shape = {"hidden_states": torch.zeros(2, 4, 96, 96, device="meta"), "timestep": torch.zeros(2, device="meta")}
    text = {
        "encoder_hidden_states": torch.zeros(2, 333, 8, device="meta"),
        "pooled_projections": torch.zeros(2, 8, device="meta"),
    }
    hook.spent.names, hook.spent.pictures = ((FULL,),), 1
    hook.spent.count(0, FULL, (), shape | text)
    with peak_memory() as peak:
        start = peak_now()
        report = handle.report()
    assert report.macs > 1e12 / 2
    if peak.resident is not None and start is not None:
        assert peak.resident - start < 5e7
    assert before == {key: weight.data_ptr() for key, weight in large.state_dict().items()}


def peak_now() -> int | None:
    try:
        with open("/proc/self/statm") as table:
            return int(table.read().split()[1]) * 4096
    except OSError:
        return None
