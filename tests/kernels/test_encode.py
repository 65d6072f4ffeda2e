"""Pictures from elsewhere, painted edits and new noise: what the run is made to lead to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.edits import (
    ELSEWHERE,
    MASK,
    SCHEDULERS,
    SIDE,
    Latents,
    editor,
    editor_of,
    inside,
    other,
    seed,
    toy,
)
from tests.tiny import noise, relative

PICTURE = noise(1, 3, SIDE, SIDE, seed=5).sigmoid()
KINDS = ("epsilon", "v_prediction", "sample")
# Diffusers' Euler, Heun, DPM2 and PNDM know fewer
PREDICTIONS = [
    *((name, "epsilon") for name in SCHEDULERS),
    *((name, "v_prediction") for name in SCHEDULERS if name != "pndm"),  # it mixes what is said at several times
    *((name, "sample") for name in ("ddim", "dpmpp_2m", "unipc", "ours dpmpp_2m", "ddpm", "sde", "ours sde")),
]


@torch.no_grad()
def encoded(pipe: Any, picture: Tensor) -> Tensor:
    """Independently of the package; the toys' pictures are in [0, 1], and Flux packs."""
    config = pipe.vae.config
    raw = pipe.vae.encode(2 * picture - 1).latent_dist.mode() - (config.shift_factor or 0)
    return raw * config.scaling_factor


def sharp(vae: Any) -> None:
    """Inpainting draws its latents from what the VAE says; no noise in that."""
    last = vae.quant_conv or vae.encoder.conv_out
    with torch.no_grad():
        channels = len(last.bias) // 2
        last.weight[channels:], last.bias[channels:] = 0, -30


def packed(latents: Tensor) -> Tensor:
    """2 x 2 latents as one token."""
    return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@pytest.mark.parametrize(("scheduler", "kind"), PREDICTIONS)
def test_the_run_leads_to_the_picture(scheduler: str, kind: str) -> None:
    """Also with schedulers that add noise of their own on the way."""
    pipe, call = toy("sd", SCHEDULERS[scheduler](prediction_type=kind))
    edit = editor_of(pipe, reference="self")
    made = edit.encode(PICTURE, **call, generator=seed())[0]
    assert relative(made, encoded(pipe, PICTURE)) < 1e-4
    edited = edit.edit(MASK, **other(call))[0]
    assert torch.equal(edited[~inside(made)], made[~inside(made)])


@pytest.mark.parametrize("reference", ["record", "self"])
@pytest.mark.parametrize(
    "name", ["sdxl", "playground", "pixart", "sd3", "flux", "sd_img2img", "sdxl_img2img", "sd3_img2img", "flux_img2img"]
)
def test_in_every_family(name: str, reference: Any) -> None:
    """PixArt's network gives variances besides, Playground's is preconditioned, and Flux packs its latents."""
    edit, call = editor(name, reference=reference)
    call.pop("image", None)
    calls: list[Any] = []
    edit.handle.network.register_forward_pre_hook(lambda *given: calls.append(given))
    inner: list[Any] = []
    first = next(iter(edit.handle.network.children()))
    first.register_forward_pre_hook(lambda *given: inner.append(given))
    made = edit.encode(PICTURE, **call, generator=seed())[0]
    truth = encoded(edit.pipe, PICTURE)
    assert relative(made, packed(truth) if made.ndim == 3 else truth) < 1e-4
    assert calls
    assert bool(inner) == (reference == "record")
    edited = edit.edit(MASK, strength=0.7, **other(call))[0]
    within = inside(made)
    assert torch.equal(edited[~within], made[~within])
    assert not torch.equal(edited[within], made[within])


@pytest.mark.parametrize(
    ("name", "scheduler", "first"),
    [
        *(("sd", "ddim", 0), ("sd", "ours dpmpp_2m", 0), ("sd3", None, 0), ("flux", None, 0)),
        *(("sd_img2img", "ddim", 2), ("sd_img2img", "pndm", 2), ("sd_img2img", "ours dpmpp_2m", 2)),
        ("sd3_img2img", None, 2),
    ],
)
def test_the_run_begins_with_the_picture_as_noised_as_its_first_step(name: str, scheduler: Any, first: int) -> None:
    """It would lead to the picture from anywhere, but with features of states that no run has."""
    pipe, call = toy(name, scheduler)
    call.pop("image", None)
    edit, seen = editor_of(pipe), []
    edit.handle.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(first_of(args, kwargs)), with_kwargs=True
    )
    edit.encode(PICTURE, **call, generator=seed())
    clean, time = encoded(pipe, PICTURE), pipe.scheduler.timesteps[first]
    clean = packed(clean) if seen[0].ndim == 3 else clean
    fresh = torch.randn(clean.shape, generator=seed())
    alpha = 1 - time / 1000 if scheduler is None else signal(time)
    sigma = 1 - alpha if scheduler is None else (1 - alpha**2) ** 0.5
    assert relative(seen[0][:1], alpha * clean + sigma * fresh) < 1e-3  # our clock is not rounded


def first_of(args: Any, kwargs: Any) -> Tensor:
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


@pytest.mark.parametrize("name", ["sd_inpaint", "sd3_inpaint", "flux_inpaint"])
def test_inpainting_keeps_all_of_the_picture(name: str) -> None:
    edit, call = editor(name)
    del call["image"], call["mask_image"]
    sharp(edit.pipe.vae)
    made = edit.encode(PICTURE, **call, generator=seed())[0]
    truth = encoded(edit.pipe, PICTURE)
    assert relative(made, packed(truth) if made.ndim == 3 else truth) < 1e-3
    edited = edit.edit(MASK, **other(call))[0]
    within = inside(made)
    assert torch.equal(edited[~within], made[~within])
    assert not torch.equal(edited[within], made[within])


def test_the_picture_is_as_the_vae_sees_it() -> None:
    pipe, call = toy("sd")
    edit = editor_of(pipe)
    made = edit.encode(PICTURE, **call | {"output_type": "pt"}, generator=seed()).images
    with torch.no_grad():
        seen = pipe.vae.decode(encoded(pipe, PICTURE) / pipe.vae.config.scaling_factor).sample
    assert relative(made, (seen / 2 + 0.5).clamp(0, 1)) < 1e-4
    assert edit.picture is made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "sde", "ours sde"])
def test_painted_edits_begin_with_what_is_painted(scheduler: str, kind: str) -> None:
    """At the first computed step the mask has the reference's state, and what was painted as noised as it is."""
    pipe, call = toy("sd", SCHEDULERS[scheduler](prediction_type=kind))
    painted_begins(pipe, call, pipe.scheduler.add_noise)


@pytest.mark.parametrize("scheduler", ["euler", "heun", "euler ancestral", "dpm2", "dpmpp_2m", "ours dpm_2s", "pndm"])
def test_painted_edits_with_other_schedulers(scheduler: str) -> None:
    pipe, call = toy("sd", scheduler)
    painted_begins(pipe, call, lambda clean, none, time: factor(pipe.scheduler, time) * clean)


def factor(scheduler: Any, time: Tensor) -> Tensor:
    """Of the signal: sigmas are for a signal of 1, or on the circle."""
    circle = ("PNDM", "DPMSolver", "SolverScheduler", "DPM2S")
    if not any(name in type(scheduler).__name__ for name in circle) and not hasattr(scheduler, "schedule"):
        return torch.ones(1, 1, 1, 1)
    return signal(time).reshape(-1, 1, 1, 1)


def signal(time: Tensor) -> Tensor:
    """Factor of the signal in Stable Diffusion."""
    squared = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    return squared[time.long()].sqrt().float()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_painted_edits_of_flows(name: str) -> None:
    pipe, call = toy(name)
    painted_begins(pipe, call, lambda clean, none, time: (1 - time.float() / 1000).reshape(-1, 1, 1, 1) * clean)


def painted_begins(pipe: Any, call: dict[str, Any], noised: Any) -> None:
    edit, latents = editor_of(pipe), Latents()
    call |= {"output_type": "np", "callback_on_step_end": latents}
    picture = torch.from_numpy(edit.generate(**call, generator=seed()).images).movedim(-1, 1)
    steps, times = len(latents), pipe.scheduler.timesteps
    before = [*latents]
    latents.clear()
    painted = picture.clone()
    painted[:, :, 2:6, 4:8] = noise(1, 3, 4, 4, seed=3).sigmoid()
    edit.edit(MASK, image=painted, strength=0.5, **other(call))
    assert edit.report.calls["replayed"] == steps // 2
    step = steps // 2
    change = noised(encoded(pipe, painted) - encoded(pipe, picture), torch.zeros(1), times[step : step + 1])
    change = packed(change) if latents[0].ndim == 3 else change
    state = before[step - 1]
    within = inside(state)
    assert relative((latents[step - 1] - state)[within], change.to(state)[within]) < 2e-4
    assert all(torch.equal(new[~within], old[~within]) for new, old in zip(latents, before, strict=True))
    assert not torch.equal(latents[-1][within], before[-1][within])


def test_painted_edits_find_their_mask() -> None:
    edit, call = editor("sd")
    made = edit.generate(**call | {"output_type": "np"}, generator=seed()).images
    painted = np.where(MASK[None, :, :, None], 1 - made, made)
    first = edit.edit(image=painted, strength=0.5).images
    edit.undo()
    assert np.array_equal(edit.edit(MASK, image=painted, strength=0.5).images, first)
    with pytest.raises(ValueError, match="the mask is empty"):
        edit.edit(image=edit.picture, strength=0.5)
    with pytest.raises(ValueError, match="say what to edit"):
        edit.edit()


@pytest.mark.parametrize(
    "scheduler", ["ddim", "euler", "dpm2", "ddpm", "euler ancestral", "dpm2 ancestral", "ours sde"]
)
def test_new_noise_still_leads_to_the_picture(scheduler: str) -> None:
    """With one computed step only, nearly: random networks say no more there. Its noise is the generator's."""
    pipe, call = toy("sd", scheduler)
    call |= {"num_inference_steps": 12, "guidance_scale": 1.0}
    edit, latents = editor_of(pipe, reference="self", refresh=1), Latents()
    call["callback_on_step_end"] = latents
    made = edit.encode(PICTURE, **call, generator=seed())[0]
    before = [*latents]
    latents.clear()
    edit.edit(MASK, strength=0.01, generator=seed(7))
    assert edit.report.calls["dense"] == 1
    within = inside(made)
    last = len(before) - 2  # the state before the computed step
    moved = (latents[last] - before[last])[within].square().mean().sqrt()
    sigma = (1 / signal(pipe.scheduler.timesteps[-1:]) ** 2 - 1) ** 0.5
    assert 0 < moved < 2 * sigma  # two noises at that level are apart by sqrt(2)
    if scheduler in ("ddim", "euler", "dpm2"):  # others have drawn anew, as in the reference
        assert moved > sigma
    if scheduler == "ddim":
        fresh = torch.randn(made.shape, generator=seed(7)) - torch.randn(made.shape, generator=seed())
        change = pipe.scheduler.add_noise(torch.zeros_like(made), fresh, pipe.scheduler.timesteps[1:2])
        assert relative((latents[0] - before[0])[within], change[within]) < 1e-3
    assert all(torch.equal(new[~within], old[~within]) for new, old in zip(latents, before, strict=True))


def test_new_noise_with_a_list_of_generators() -> None:
    edit, call = editor("sd")
    made = edit.generate(**call, num_images_per_prompt=2, generator=[seed(0), seed(1)])[0]
    both = edit.edit(MASK, generator=[seed(3), seed(4)])[0]
    for row, number in enumerate((3, 4)):
        alone, _ = editor("sd")
        alone.generate(**call, generator=seed(row))
        assert relative(alone.edit(MASK, generator=seed(number))[0], both[row : row + 1]) < 1e-4
    assert torch.equal(both[~inside(made)], made[~inside(made)])


@pytest.mark.parametrize("reference", ["record", "self"])
def test_several_pictures(reference: Any) -> None:
    edit, call = editor("sd", reference=reference)
    pictures = torch.cat([PICTURE, 1 - PICTURE])
    made = edit.encode(pictures, **call, num_images_per_prompt=2, generator=seed())[0]
    assert relative(made, encoded(edit.pipe, pictures)) < 1e-4
    with pytest.raises(ValueError, match="2 pictures for a run that makes 1"):
        edit.encode(pictures, **call)
    with pytest.raises(RuntimeError, match="nothing to edit yet"):
        edit.edit(MASK)
    made = edit.encode(PICTURE, **call, num_images_per_prompt=2, generator=seed())[0]
    assert relative(made[0], made[1]) < 1e-4
    edited = edit.edit([MASK, ELSEWHERE], **other(call))[0]
    for row, mask in enumerate((MASK, ELSEWHERE)):
        within = inside(made[row : row + 1], mask)[0]
        assert torch.equal(edited[row][~within], made[row][~within])
        assert (edited[row] != made[row])[within].all()


def test_strength_is_the_share_that_is_computed() -> None:
    edit, call = editor("sd")
    edit.generate(**call | {"num_inference_steps": 10}, generator=seed())
    for strength, computed in ((1.0, 10), (0.95, 10), (0.7, 7), (0.3, 3), (0.31, 4), (0.1, 1), (1e-9, 1)):
        edit.edit(MASK, strength=strength)
        assert edit.report.calls == {"sparse": computed} | ({"replayed": 10 - computed} if computed < 10 else {})
        assert len(edit.report.call_seconds) == 2  # of the reference, and of sparse calls


def test_what_cannot_be_encoded_is_refused() -> None:
    pipe, call = toy("sd")
    edit = editor_of(pipe)
    pipe.scheduler.register_to_config(prediction_type="flux capacitor")
    with pytest.raises(ValueError, match="prediction_type='flux capacitor' is unknown"):
        edit.encode(PICTURE, **call)
    pipe, call = toy("sd_img2img")
    edit = editor_of(pipe)
    edit.generate(**call | {"output_type": "latent"}, generator=seed())
    with pytest.raises(TypeError, match="begins with a picture; new noise"):
        edit.edit(MASK, generator=seed(1))
    with pytest.raises(ValueError, match="output_type='latent' makes none"):
        edit.edit(MASK, image=PICTURE)
