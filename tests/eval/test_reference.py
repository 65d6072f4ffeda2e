"""The reference converges, is a function of prompt and seed alone, and survives an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffaccel.cost import network_calls
from diffaccel.eval import Reference, ReferenceSettings, converged_reference, latent_mse
from diffaccel.eval.reference import weights_hash
from tests.tiny import noise, sd

PROMPTS = ["a", "b", "c"]


class Prompted:
    """The tiny pipeline with prompts: each stands for its own embedding."""

    def __init__(self) -> None:
        self.pipe, self.arguments = sd()
        self.unet = self.pipe.unet
        self.scheduler = self.pipe.scheduler
        self.asked: list[list[str]] = []

    def set_progress_bar_config(self, **config: Any) -> None:
        self.pipe.set_progress_bar_config(**config)

    def __call__(self, prompt: list[str], **call: Any) -> Any:
        self.asked.append(prompt)
        self.pipe.scheduler = self.scheduler
        embeds = torch.cat([noise(1, 4, 8, seed=ord(p)) for p in prompt])
        negative = noise(1, 4, 8).repeat(len(prompt), 1, 1)
        return self.pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **call)


@pytest.fixture
def pipe() -> Prompted:
    return Prompted()


def reference(pipe: Prompted, prompts: list[str] = PROMPTS, steps: int = 4, **options: Any) -> Reference:
    settings = ReferenceSettings(steps=steps)
    return converged_reference(pipe, prompts, [0, 1], guidance_scale=2.0, settings=settings, progress=False, **options)


def test_error_shrinks_with_the_steps(pipe: Prompted) -> None:
    coarse, fine = reference(pipe, steps=5), reference(pipe, steps=20)
    assert coarse.latents.shape == (6, 4, 8, 8)
    assert coarse.pairs[:3] == (("a", 0), ("a", 1), ("b", 0))
    assert (fine.errors < 0.1 * coarse.errors).all()
    # the estimate is an upper bound of the error that it estimates
    assert (latent_mse(coarse.latents, fine.latents) < coarse.errors).all()


def test_convergence_is_judged_against_what_is_reported() -> None:
    errors = torch.tensor([1e-6, 1e-4, 1e-3], dtype=torch.float64)
    found = Reference(torch.zeros(3, 4), errors, (("a", 0), ("a", 1), ("b", 0)))
    assert found.converged(1e-2).tolist() == [True, True, False]
    assert found.converged(1e-2, share=1e-3).tolist() == [True, False, False]


def test_a_pair_does_not_depend_on_its_batch(pipe: Prompted) -> None:
    together, alone = reference(pipe), reference(pipe, ["b"])
    reordered = reference(pipe, ["c", "b", "a"], batch_prompts=1)
    assert torch.allclose(together.latents[2:4], alone.latents, atol=1e-5)
    assert torch.allclose(together.latents[2:4], reordered.latents[2:4], atol=1e-5)


def test_every_pair_has_its_own_noise(pipe: Prompted) -> None:
    latents = reference(pipe).latents
    assert all((latents[i] - latents[j]).abs().max() > 0.1 for i in range(6) for j in range(i))


def test_an_interrupted_run_goes_on(pipe: Prompted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reference(pipe, batch_prompts=1)
    calls: list[list[str]] = []

    def interrupted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Prompted, prompt: list[str], **kwargs: Any) -> Any:
            calls.append(prompt)
            if prompt[0] == "c" and len(calls) < 6:
                raise KeyboardInterrupt
            return original(self, prompt, **kwargs)

        return call

    monkeypatch.setattr(Prompted, "__call__", interrupted(Prompted.__call__))
    scheduler = pipe.scheduler
    with pytest.raises(KeyboardInterrupt):
        reference(pipe, batch_prompts=1, cache=tmp_path)
    assert pipe.scheduler is scheduler, "a pipeline gets its scheduler back, whatever happens"
    again = reference(pipe, batch_prompts=1, cache=tmp_path)
    assert [prompt[0] for prompt in calls] == ["a", "a", "b", "b", "c", "c", "c"], "a and b are not run again"
    assert torch.equal(whole.latents, again.latents)
    assert torch.equal(whole.errors, again.errors)
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_cache_is_read_instead_of_the_network(pipe: Prompted, tmp_path: Path) -> None:
    first = reference(pipe, cache=tmp_path)
    with network_calls(pipe) as count:
        second = reference(pipe, cache=tmp_path)
    assert count.calls == 0
    assert torch.equal(first.latents, second.latents)


def test_other_weights_or_settings_miss_the_cache(pipe: Prompted, tmp_path: Path) -> None:
    first = reference(pipe, cache=tmp_path)
    weight: Tensor = pipe.unet.conv_in.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0, 0, 0] += 0.5
    try:
        second = reference(pipe, cache=tmp_path)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert not torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents, reference(pipe, steps=5, cache=tmp_path).latents)


def test_weights_hash_sees_values_not_layout(pipe: Prompted) -> None:
    before = weights_hash(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    assert weights_hash(pipe) == before
    pipe.unet.to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize(("prompts", "seeds"), [([], [0]), (["a"], []), (["a", "a"], [0]), (["a"], [0, 0])])
def test_pairs_must_be_there_and_differ(pipe: Prompted, prompts: list[str], seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        converged_reference(pipe, prompts, seeds, guidance_scale=2.0)
