"""A batch whose samples go to different networks is what each sample is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput
from torch import Tensor

from diffaccel.samplers.policy import FULL, attach
from diffaccel.samplers.policy.rows import split, take
from tests.policy import Fixed, calls, smaller, toy
from tests.tiny import draw, noise, relative

TABLE = (("a", FULL, "a"), ("b", FULL, "a"), (FULL, "a", "b"), (FULL, FULL, FULL))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_samples_of_a_batch_are_as_alone(name, guidance_scale):
    pipe, call = toy(name)
    call["guidance_scale"] = guidance_scale
    variants = {"a": smaller(pipe, 1), "b": smaller(pipe, 2)}
    size = 3
    texts = {key: noise(size, *value.shape[1:], seed=9) for key, value in call.items() if "embeds" in key}
    texts |= {key: value.repeat(size, 1) for key, value in call.items() if "mask" in key}
    latents = noise(size, 4, 8, 8)
    with attach(pipe, Fixed(TABLE), variants):
        together = draw((pipe, call), pipe.scheduler, 4, **texts, latents=latents)
    for i in range(size):
        alone = {key: value[i : i + 1] for key, value in texts.items()}
        with attach(pipe, Fixed(tuple((row[i],) for row in TABLE)), variants):
            expected = draw((pipe, call), pipe.scheduler, 4, **alone, latents=latents[i : i + 1])
        assert relative(together[i : i + 1], expected) < 1e-5


def test_several_images_of_a_prompt():
    """Samples are numbered as the pipeline lays them out: prompt by prompt, image by image."""
    pipe, call = toy("sd")
    texts = {key: noise(2, 4, 8, seed=9) for key in ("prompt_embeds", "negative_prompt_embeds")}
    latents = noise(4, 4, 8, 8)
    small = smaller(pipe)
    table = (("a", "a", FULL, "a"),) * 3
    with attach(pipe, Fixed(table), {"a": small}) as handle:
        picture = draw((pipe, call), pipe.scheduler, 3, **texts, latents=latents, num_images_per_prompt=2)
        assert calls(handle) == {"a": 3, FULL: 3}
    plain = draw((pipe, call), pipe.scheduler, 3, **texts, latents=latents, num_images_per_prompt=2)
    pipe.unet = small
    of_small = draw((pipe, call), pipe.scheduler, 3, **texts, latents=latents, num_images_per_prompt=2)
    expected = torch.stack([of_small[0], of_small[1], plain[2], of_small[3]])
    assert relative(picture, expected) < 1e-5


def double(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Twice the rows, and what else a call was given: enough to see who had which."""
    x = args[0] * {"a": 2, "b": 3}[name]
    if kwargs.get("return_dict", True):
        return Transformer2DModelOutput(sample=x)
    return x, kwargs["more"]["time_ids"]


def test_rows_are_put_back_in_order():
    x, ids = noise(6, 2, 3), noise(6, 5)
    result: Any = split(("a", "b", "a"), double, (x,), {"more": {"time_ids": ids}, "return_dict": False})
    assert torch.equal(result[0], x * torch.tensor([2, 3, 2, 2, 3, 2])[:, None, None])
    assert torch.equal(result[1], ids)
    output: Any = split(("a", "b"), double, (x,), {})
    assert isinstance(output, Transformer2DModelOutput)
    assert torch.equal(output.sample[1::2], 3 * x[1::2])


def test_only_what_has_the_batch_is_cut():
    time, scalar, one, residuals = torch.arange(4), torch.tensor(7), noise(1, 5), [noise(4, 2), noise(4, 3)]
    taken = take({"time": time, "scalar": scalar, "one": one, "residuals": residuals, "scale": 0.5}, [0, 3], 4)
    assert taken["time"].tolist() == [0, 3]
    assert taken["scalar"] is scalar
    assert taken["one"] is one
    assert taken["scale"] == 0.5
    assert all(
        isinstance(r, Tensor) and torch.equal(r, o[[0, 3]]) for r, o in zip(taken["residuals"], residuals, strict=True)
    )


def test_plan_for_another_number_of_samples():
    with pytest.raises(ValueError, match="the plan is for 4 samples, and the batch has 6 rows; plan one for"):
        split(("a", "b", "a", "b"), double, (noise(6, 2),), {})
