"""Measures against the formulas written out, and intervals against what resampling must give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from diffaccel.eval import clip_distance, latent_mse, paired_interval, psnr
from tests.tiny import noise


def test_latent_mse_is_per_sample() -> None:
    a, b = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)
    expected = [sum(float(v) ** 2 for v in (x - y).flatten()) / 16 for x, y in zip(a.double(), b.double(), strict=True)]
    assert latent_mse(a, b).tolist() == pytest.approx(expected)


def test_psnr_is_per_image() -> None:
    a, b = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, 5, 5)
    b[1] = a[1]
    b[1, 0, 0, 0] += 0.1 if a[1, 0, 0, 0] < 0.5 else -0.1
    expected = [10 * math.log10(1 / float((a[0].double() ** 2).mean())), 10 * math.log10(75 / 0.01)]
    # not what pooling the squared errors over the batch would give, twice the same number
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def test_identical_pictures_have_infinite_psnr() -> None:
    a = torch.full((1, 3, 4, 4), 0.3)
    assert psnr(a, a).tolist() == [math.inf]


@pytest.mark.parametrize(
    ("a", "match"),
    [
        (torch.full((1, 3, 4, 4), 255.0), r"lie in \[0, 1\]"),
        (torch.full((1, 3, 4, 4), -0.5), r"lie in \[0, 1\]"),
        (torch.full((1, 3, 4, 4), math.nan), r"lie in \[0, 1\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "must be floats"),
        (torch.zeros(2, 3, 4, 4), "one shape"),
    ],
)
def test_psnr_refuses_other_pictures(a: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        psnr(a, torch.zeros(1, 3, 4, 4))


def test_latent_mse_refuses_failed_runs() -> None:
    with pytest.raises(ValueError, match="finite"):
        latent_mse(torch.full((1, 4), math.nan), torch.zeros(1, 4))


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPImageProcessor]:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 10,
        "intermediate_size": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).eval()
    return model, CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def test_clip_distance_is_one_minus_cosine(clip: tuple[CLIPModel, CLIPImageProcessor]) -> None:
    model, processor = clip
    # colours of whole bytes, at the processor's own size: its output can be written down
    a, b = (torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(s)) / 255 for s in (0, 1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        vision = [model.vision_model(pixel_values=(x - mean) / std).pooler_output for x in (a, b)]
        x, y = (model.visual_projection(v).double() for v in vision)
    expected = 1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    distance = clip_distance(a, b, model, processor)
    assert distance.shape == (2,)
    assert torch.allclose(distance, expected, atol=1e-6)
    assert clip_distance(a, a, model, processor).abs().max() < 1e-12


def test_paired_interval_takes_ratios_in_logarithm() -> None:
    prompts = [0, 0, 1, 1, 2, 2]
    a, b = np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, 4, 6, 8, 10, 12])
    forth, back = paired_interval(a, b, prompts), paired_interval(b, a, prompts)
    assert (forth.median, forth.low, forth.high) == pytest.approx((0.5, 0.5, 0.5))
    assert back.median == pytest.approx(2.0)
    assert (forth.pairs, forth.clusters) == (6, 3)


def test_paired_interval_of_differences() -> None:
    result = paired_interval([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], ["x", "y", "z"], ratio=False)
    assert (result.median, result.low, result.high) == (2.0, 1.0, 3.0)


def test_seeds_of_a_prompt_stay_together() -> None:
    """Copies of a prompt's pair add no knowledge: with 4 of each, the interval stays as wide, and does not halve."""
    values = np.random.default_rng(0).lognormal(size=200)
    once = paired_interval(values, np.ones(200), range(200))
    width = math.log(once.high / once.low)
    together = paired_interval(values.repeat(4), np.ones(800), np.arange(200).repeat(4).tolist())
    apart = paired_interval(values.repeat(4), np.ones(800), range(800))
    assert math.log(together.high / together.low) == pytest.approx(width)
    assert math.log(apart.high / apart.low) < 0.7 * width


def test_paired_interval_covers_the_truth() -> None:
    """200 experiments of 32 prompts x 4 seeds: a 95 % interval holds the true median 90 to 99 % of the time."""
    rng, prompts = np.random.default_rng(0), np.arange(32).repeat(4).tolist()
    hits = 0
    for _ in range(200):
        logs = 0.3 + rng.normal(size=32).repeat(4) + 0.5 * rng.normal(size=128)
        found = paired_interval(np.exp(logs), np.ones(128), prompts, resamples=400)
        hits += math.log(found.low) <= 0.3 <= math.log(found.high)
    assert 180 <= hits <= 198


def test_paired_interval_is_deterministic_and_takes_equal_zeros() -> None:
    a, b = [0.0, 1.0, 2.0], [0.0, 2.0, 1.0]
    assert paired_interval(a, b, "xyz") == paired_interval(a, b, "xyz")
    assert paired_interval(a, b, "xyz").median == 1.0


@pytest.mark.parametrize(
    ("a", "prompts", "match"),
    [([1.0], "x", "at least 2"), ([1.0, 2.0], "xyz", "one length"), ([1.0, -1.0], "xy", "not negative")],
)
def test_paired_interval_refuses(a: list[float], prompts: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        paired_interval(a, [1.0] * len(a), prompts)


def test_prompts_may_have_lost_different_numbers_of_seeds() -> None:
    """Dropped pairs leave prompts of unequal size; resampling by the definition, one draw after the other, agrees."""
    rng = np.random.default_rng(3)
    groups = [rng.lognormal(size=n) for n in (1, 4, 2, 3, 4)]
    prompts = [i for i, group in enumerate(groups) for _ in group]
    found = paired_interval(np.concatenate(groups), np.ones(14), prompts, resamples=400)
    draws = np.random.default_rng(0).integers(5, size=(400, 5))
    medians = [float(np.median(np.log(np.concatenate([groups[i] for i in draw])))) for draw in draws]
    expected = np.exp(np.quantile(medians, [0.025, 0.975], method="closest_observation"))
    assert (found.low, found.high) == pytest.approx(tuple(expected))
