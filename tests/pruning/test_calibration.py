"""Calls recorded from every kind of pipeline, and random ones where there is none."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffaccel.cost import denoisers
from diffaccel.pruning.calibration import random_calls, record, run, still
from tests import tiny

TOYS = {"sd": tiny.sd, "sdxl": tiny.sdxl, "dit": tiny.dit, "pixart": tiny.pixart, "sd3": tiny.sd3, "flux": tiny.flux}
NETWORKS = {name: next(iter(denoisers(toy()[0]).values())) for name, toy in TOYS.items()}


def times(calls: Any) -> list[float]:
    """Timestep of each call, of its first row."""
    found = [call.kwargs["timestep"] if "timestep" in call.kwargs else call.args[1] for call in calls]
    return [float(time.reshape(-1)[0]) for time in found]


@pytest.mark.parametrize("kind", TOYS)
def test_a_recorded_call_gives_what_the_pipeline_saw(kind: str) -> None:
    pipe, arguments = TOYS[kind]()
    network = NETWORKS[kind]
    seen: list[torch.Tensor] = []
    handle = network.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    try:
        kept = record(pipe, [arguments], calls=3, steps=3).calls
    finally:
        handle.remove()
    assert len(kept) == len(seen) == 3
    learned_variance = 2 if kind in ("dit", "pixart") else 1
    for call, output in zip(kept, seen, strict=True):
        with torch.no_grad():
            replayed = run(network, call)
        assert output.shape[1] == learned_variance * replayed.shape[1]
        torch.testing.assert_close(replayed, output[:, : replayed.shape[1]], rtol=0, atol=0)


def test_calls_are_spread_over_prompts_and_steps() -> None:
    pipe, arguments = tiny.sd()
    kept = record(pipe, [arguments] * 2, calls=6, steps=12).calls
    first, second = times(kept[:3]), times(kept[3:])
    assert len(kept) == 6
    assert first == sorted(first, reverse=True)
    assert first[0] - first[2] > 500, "over the whole trajectory"
    assert not set(first) & set(second), "prompts differ in the steps that they give"


def test_more_prompts_than_calls_are_thinned_out_evenly() -> None:
    pipe, arguments = tiny.sd()
    ran: list[dict[str, Any]] = []

    def prompts() -> list[Any]:
        return [
            {**arguments, "callback_on_step_end": lambda p, i, t, k, n=n: ran.append({"n": n}) or k} for n in range(8)
        ]

    kept = record(pipe, prompts(), calls=2, steps=2).calls
    assert len(kept) == 2
    assert [each["n"] for each in ran[::2]] == [3, 7]


def test_a_short_trajectory_gives_all_it_has() -> None:
    pipe, arguments = tiny.sd()
    assert len(record(pipe, [arguments], calls=9, steps=2).calls) == 2


def test_guidance_and_seed_arrive() -> None:
    pipe, arguments = tiny.sd()
    arguments.pop("guidance_scale")
    alone = record(pipe, [arguments], calls=1, steps=1, guidance_scale=1.0).calls[0]
    guided = record(pipe, [arguments], calls=1, steps=1, guidance_scale=4.0).calls[0]
    other = record(pipe, [arguments], calls=1, steps=1, guidance_scale=4.0, seed=1).calls[0]
    assert len(alone.args[0]) == 1
    assert len(guided.args[0]) == 2
    assert not torch.equal(guided.args[0], other.args[0])


def test_class_numbers_are_prompts_of_dit() -> None:
    pipe, _ = tiny.dit()
    call = record(pipe, [7], calls=1, steps=1, guidance_scale=1.0).calls[0]
    assert call.kwargs["class_labels"].tolist() == [7]


def test_what_does_not_change_is_kept_once_and_what_changes_is_copied() -> None:
    pipe, arguments = tiny.sd()
    first, second = record(pipe, [arguments], calls=2, steps=2).calls
    assert first.kwargs["encoder_hidden_states"] is second.kwargs["encoder_hidden_states"]
    assert not torch.equal(first.args[0], second.args[0])


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe, arguments = tiny.sd()
    before = dict(pipe._progress_bar_config)
    pipe.set_progress_bar_config(disable=False, desc="mine")
    try:
        record(pipe, [arguments], calls=1, steps=1)
        with pytest.raises(ZeroDivisionError):
            record(pipe, [{**arguments, "callback_on_step_end": lambda *_: 1 / 0}], calls=1, steps=1)
        assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}
    finally:
        pipe.set_progress_bar_config(**before)
    assert not pipe.unet._forward_pre_hooks


def test_nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = tiny.sd()
    arguments.pop("output_type")
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: pytest.fail("the VAE was called"))
    record(pipe, [arguments], calls=1, steps=1)


def test_recorded_in_inference_mode_and_still_differentiable() -> None:
    pipe, arguments = tiny.sd()
    with torch.inference_mode():
        kept = record(pipe, [arguments], calls=1, steps=1).calls[0]
    assert not kept.args[0].is_inference()


@pytest.mark.parametrize("prompts", [[], (), "a cat", {"prompt": "a cat"}])
def test_no_list_of_prompts(prompts: Any) -> None:
    with pytest.raises(ValueError, match="calibration"):
        record(tiny.sd()[0], prompts)


def test_bad_numbers_prompts_and_pipelines() -> None:
    pipe, arguments = tiny.sd()
    with pytest.raises(ValueError, match="calls >= 1"):
        record(pipe, [arguments], calls=0)
    with pytest.raises(TypeError, match="not float"):
        record(pipe, [1.5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="no network"):
        record(SimpleNamespace(), ["a cat"])
    two = SimpleNamespace(transformer=torch.nn.Identity(), transformer_2=torch.nn.Identity())
    with pytest.raises(ValueError, match="several denoisers"):
        record(two, ["a cat"])


@pytest.mark.parametrize("kind", TOYS)
def test_random_calls_run_and_cover_the_timesteps(kind: str) -> None:
    network = NETWORKS[kind]
    side = {"size": 8} if kind == "flux" else {}
    made = random_calls(network, 4, seed=1, text_length=4, **side)
    with torch.no_grad():
        outputs = [run(network, call) for call in made.calls]
    end = 1.0 if kind == "flux" else 1000
    assert all(output.isfinite().all() for output in outputs)
    assert times(made.calls) == pytest.approx([end * share for share in (0.125, 0.375, 0.625, 0.875)])
    assert not torch.equal(outputs[0], outputs[1])
    with pytest.raises(ValueError, match="at least one call"):
        random_calls(network, 0)


def test_still_restores_modes_and_gradients() -> None:
    network = copy.deepcopy(tiny.dit()[0].transformer).train()
    network.proj_out_1.eval()
    network.proj_out_2.weight.requires_grad_(False)
    with still(network):
        assert not any(module.training for module in network.modules())
        assert not any(weight.requires_grad for weight in network.parameters())
    assert network.training
    assert not network.proj_out_1.training
    assert network.proj_out_1.weight.requires_grad
    assert not network.proj_out_2.weight.requires_grad
